"""The comparison, made tiny: equal budgets, numbers that follow from the runs, resumption."""

import json

import pytest

from slime_fipo.errors import UserError
from slime_fipo.local.compare import _measure, _parse
from slime_fipo.records import read_records

from .rig import TINY, metrics_without_times, micro_flags

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
    assert str(root / "report.html") in output and (root / "report.html").exists()
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


SET_BY_THE_COMPARISON = {
    "--seed": "9",
    "--load": "runs/other",
    "--loss-type": "policy_loss",
    "--eps-clip-c": "3",
    "--fipo-preset": "7b",
    "--fipo-decay-rate": "8",
    "--fipo-safety-thresh": "none",
    "--fipo-clip-ratio": "0.1",
}


@pytest.mark.parametrize("flag", SET_BY_THE_COMPARISON)
def test_what_the_comparison_sets_is_refused_in_every_spelling(flag):
    value = SET_BY_THE_COMPARISON[flag]
    for spelling in ([flag, value], [f"{flag}={value}"], ["--lr", "1e-3", f"{flag}={value}", "--rollout-shuffle"]):
        with pytest.raises(UserError, match=f"^{flag} is what the comparison sets itself"):
            _parse(spelling)
    with pytest.raises(UserError, match=flag[:-1]):  # no abbreviation passes either
        _parse([f"{flag[:-1]}={value}"])


def test_switches_that_the_comparison_sets():
    for flag in ("--fipo-unclipped", "--no-fipo-unclipped", "--fipo-clip-high-only"):
        with pytest.raises(UserError, match="is what the comparison sets itself"):
            _parse([flag])


@pytest.mark.parametrize("flags", [["--first-seed", "-1"], ["--first-seed", "1e3"], ["--seeds", "nan"], ["--seeds=-1"]])
def test_bad_numbers_are_refused_before_any_run(flags):
    with pytest.raises(UserError, match=flags[0].partition("=")[0]):
        _parse(flags)


def test_own_held_out_data_and_records(command, tmp_path):
    """The report reads the metrics under the name that the data was given, and each run records into its own folder."""
    flags = [*micro_flags(tmp_path), "--demo-data", str(tmp_path / "demo.jsonl"), "--label-key", "answer"]
    rows = [{"prompt": f"{i}=", "answer": "", "response": ""} for i in range(4)]
    for name in ("micro.jsonl", "demo.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    root = tmp_path / "compare"
    command("compare", *flags, "--seeds", "1", "--save", str(root), "--fipo-record", str(root))
    numbers = json.loads((root / "compare.json").read_text())
    for arm, folder in ARMS.items():
        last = [row for row in metrics_without_times(root / "seed-1" / folder) if "eval/step" in row][-1]
        assert numbers["measures"][arm][0]["final"] == last["eval/micro"]
        found = read_records(root / "seed-1" / folder / "records")
        assert found.missing == [] and {record.header.rollout_id for record in found.records} == {0}
