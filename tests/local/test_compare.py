"""The comparison, made tiny: equal budgets, numbers that follow from the runs, resumption."""

import json

import pytest

from slime_fipo.local.compare import _measure

from .rig import TINY, metrics_without_times

SHRINK = [*TINY.split(), "--eval-interval", "1", "--seeds", "2", "--num-rollout", "2"]
ARMS = {"DAPO": "dapo", "FIPO 7b": "fipo-7b", "FIPO 32b": "fipo-32b"}


def test_measures():
    measured = _measure({"rollouts": [0, 2, 4], "accuracy": [0.5, 0.9, 0.7], "length": [7.0, 9.0, 8.0]})
    assert measured == pytest.approx({"area": 0.75, "final": 0.7, "dip": 0.2, "length": 8.0})


def test_compare(command, tmp_path):
    root = tmp_path / "compare"
    output = command("compare", *SHRINK, "--save", str(root)).stdout
    numbers = json.loads((root / "compare.json").read_text())
    assert list(numbers["measures"]) == list(ARMS)
    for arm, folder in ARMS.items():
        for i, seed in enumerate((1, 2)):
            runs = {name: metrics_without_times(root / f"seed-{seed}" / name) for name in ("base", folder)}
            first, *_, last = [row for row in runs[folder] if "eval/step" in row]
            assert first == runs["base"][-1]  # the same base model, evaluated alike
            assert numbers["measures"][arm][i]["final"] == last["eval/heldout"]
            deviations = [row.get("fipo/influence_deviation", 0) for row in runs[folder]]
            assert (sum(deviations) > 0) is (arm != "DAPO")
    assert (root / "compare.png").read_bytes().startswith(b"\x89PNG")
    table = (root / "compare.md").read_text()
    for arm, per_seed in numbers["measures"].items():
        assert f"| {arm} | {sum(m['area'] for m in per_seed) / 2:.3f} ±" in table and arm in output

    (root / "seed-2/fipo-32b/summary.json").unlink()
    (root / "compare.md").unlink()
    again = command("compare", *SHRINK, "--save", str(root)).stdout
    assert again.count("is finished; nothing was run") == 7
    assert (root / "compare.md").read_text() == table


@pytest.mark.parametrize(
    ("flags", "says"),
    [(["--seeds", "0"], "--seeds: 0 is out of range"), (["--seed", "3"], "--seed is what"), (["--lr", "-1"], "--lr")],
)
def test_bad_input(command, tmp_path, flags, says):
    result = command("compare", *SHRINK, *flags, "--save", str(tmp_path / "compare"), check=False)
    assert result.returncode == 2 and says in result.stderr and len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "compare").exists()
