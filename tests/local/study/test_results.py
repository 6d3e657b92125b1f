"""Tables, files and the sentence, from curves with known answers."""

import csv
import json

import numpy as np
import pytest

from slime_fipo.local.study.results import (
    MEASURES,
    Curve,
    Study,
    conclusion,
    effect_rows,
    markdown,
    mean_rows,
    write_results,
)

SEEDS = range(3, 9)
OFFSETS = np.array([0.01, -0.01, 0.02, -0.02, 0.005, -0.005])  # per seed, as large as a seed's luck is


def curve(height: float, length: float = 20.0) -> Curve:
    """Accuracy rises from 0.2 to ``height`` at rollout 2 and stays there until 6: its area is known."""
    return Curve([0, 2, 6], [0.2, height, height], [10.0, 15.0, length])


@pytest.fixture
def study() -> Study:
    seed_luck = np.linspace(-0.1, 0.1, len(SEEDS))
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.0005, len(SEEDS))

    def per_seed(effect, jitter, length):
        return {s: curve(0.7 + seed_luck[i] + effect + jitter[i], length) for i, s in enumerate(SEEDS)}

    return Study(
        {
            "DAPO": per_seed(0, OFFSETS * 0, 20.0),
            "better": per_seed(0.03, noise, 22.0),
            "the same": per_seed(0, OFFSETS, 20.0),
        },
        "DAPO",
    )


def test_measures():
    assert curve(0.8, 17.0).measures() == pytest.approx({"area": (0.5 * 2 + 0.8 * 4) / 6, "final": 0.8, "length": 17.0})
    # Unevenly spaced evaluations count by the rollouts between them.
    assert Curve([4, 5, 10], [0.0, 0.0, 1.0], [1.0] * 3).measures()["area"] == pytest.approx(2.5 / 6)


def test_read_from_a_run(tmp_path):
    rows = [
        {"demo/step": 5, "demo/loss": 1.0},
        {"eval/step": 0, "eval/mine": 0.25, "eval/mine/response_len/mean": 4.0, "eval/mine-truncated_ratio": 0.0},
        {"rollout/step": 0, "rollout/raw_reward": 0.5},
        {"eval/step": 1, "eval/mine": 0.5, "eval/mine/response_len/mean": 5.0, "eval/mine-truncated_ratio": 0.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert Curve.read(tmp_path) == Curve([0, 1], [0.25, 0.5], [4.0, 5.0])


def test_effects_are_paired(study):
    """Seeds differ by 0.2, the arms by 0.03: only the pairs tell."""
    effects = study.effects()
    assert set(effects) == {(arm, m.key) for arm in ("better", "the same") for m in MEASURES}
    final, area = effects["better", "final"], effects["better", "area"]
    assert final.mean == pytest.approx(0.03, abs=0.001) and area.mean == pytest.approx(0.03 * 5 / 6, abs=0.001)
    assert final.half_width < 0.002 and final.p_value == pytest.approx(2 / 2**6)
    assert effects["better", "length"].mean == 2.0
    same = effects["the same", "area"]
    assert same.mean == pytest.approx(0) and not same.excludes_zero and same.p_value > 0.5
    other = Study(study.curves, "better").effects()
    assert other["DAPO", "final"].mean == pytest.approx(-final.mean) and ("better", "final") not in other


def test_the_sentence(study):
    effects = study.effects()
    text = conclusion(study, effects)
    half = effects["the same", "area"].half_width
    assert "over 6 seeds, this study can tell from DAPO better (+0.02" in text
    assert "and cannot tell the same; it resolves" in text and f"{half:.4f}" in text
    nothing = Study({arm: study.curves[arm] for arm in ("DAPO", "the same")}, "DAPO")
    assert "this study can tell no arm from DAPO; it resolves" in conclusion(nothing, nothing.effects())
    one = Study({arm: {3: per_seed[3]} for arm, per_seed in study.curves.items()}, "DAPO")
    assert conclusion(one, one.effects()).startswith("One seed gives no interval")


def test_tables(study):
    effects = study.effects()
    means, differences = mean_rows(study), effect_rows(study, effects)
    assert [row[0] for row in means[1:]] == ["DAPO", "better", "the same"]
    values = [0.7 + luck for luck in np.linspace(-0.1, 0.1, 6)]
    assert means[1][2] == f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"
    e = effects["better", "final"]
    assert differences[1][2] == f"{e.mean:+.4f} [{e.low:+.4f}, {e.high:+.4f}], p = {e.p_value:.4f}"
    page = markdown(study, effects, "slime-fipo compare")
    for row in (*means, *differences):
        assert "| " + " | ".join(row) + " |" in page
    one = Study({arm: {3: per_seed[3]} for arm, per_seed in study.curves.items()}, "DAPO")
    assert mean_rows(one)[1][2] == "0.600"
    assert effect_rows(one, one.effects())[1][3] == "+2.00 [–, –], p = –"


def test_files_hold_every_number(study, tmp_path):
    effects = study.effects()
    arms = {"DAPO": "--loss-type policy_loss", "better": "--lr 1", "the same": ""}
    write_results(tmp_path, study, effects, "slime-fipo compare --seeds 6", arms)
    with (tmp_path / "curves.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    again: dict = {}
    for row in rows:
        per_seed = again.setdefault(row["arm"], {}).setdefault(int(row["seed"]), Curve([], [], []))
        per_seed.rollouts.append(int(row["rollouts"]))
        per_seed.accuracy.append(float(row["accuracy"]))
        per_seed.length.append(float(row["response_length"]))
    assert again == study.curves
    with (tmp_path / "effects.csv").open(newline="") as file:
        rows = {(row["arm"], row["measure"]): row for row in csv.DictReader(file)}
    assert {key: float(row["low"]) for key, row in rows.items()} == {key: e.low for key, e in effects.items()}
    assert {row["baseline"] for row in rows.values()} == {"DAPO"}
    described = json.loads((tmp_path / "compare.json").read_text())
    assert described["arms"] == arms and described["seeds"] == list(SEEDS)
    assert described["conclusion"] in (tmp_path / "compare.md").read_text()
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
