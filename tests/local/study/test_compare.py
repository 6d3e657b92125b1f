"""The study from end to end: pairing, a null and an effect that were planted, resumption."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slime_fipo.records import read_records

from ..rig import MICRO, TINY, metrics_without_times, micro_flags

DAPO = "--loss-type policy_loss --eps-clip-c 10"


def arm_flags(**arms: str) -> list[str]:
    return [part for name, flags in arms.items() for part in ("--arm", f"{name}={flags}")]


def effects(folder: Path) -> dict[tuple[str, str], dict[str, float]]:
    """By (arm, measure)."""
    with (folder / "effects.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    numbers = ("mean", "low", "high", "p_value")
    return {(row["arm"], row["measure"]): {name: float(row[name]) for name in numbers} for row in rows}


NULL = [
    *TINY.split(),
    *("--num-rollout", "2", "--eval-interval", "1"),
    *arm_flags(dapo=DAPO, twice=DAPO, others=f"{DAPO} --sampling-stream 1", fipo="--fipo-preset 7b"),
]


def test_pairs_nulls_and_what_is_added_later(command, tmp_path):
    root = tmp_path / "study"
    output = command("compare", *NULL, "--seeds", "2", "--save", str(root)).stdout
    assert "10 of 10 runs: seed 2" in output
    rows = {}
    for seed in (1, 2):
        for folder in ("base", "dapo", "twice", "others", "fipo"):
            rows[seed, folder] = metrics_without_times(root / f"seed-{seed}" / folder)
        base, dapo = rows[seed, "base"], rows[seed, "dapo"]
        for folder in ("dapo", "twice", "others", "fipo"):
            assert rows[seed, folder][0] == base[-1]  # the same base model, evaluated alike
        assert rows[seed, "twice"] == dapo
        sampled = [{k: v for k, v in rows[seed, f][1].items() if k.startswith("rollout/")} for f in ("dapo", "fipo")]
        assert sampled[0] == sampled[1]  # the same prompts and draws, until the policies differ
        assert rows[seed, "fipo"] != dapo and rows[seed, "others"] != dapo
    assert rows[1, "dapo"] != rows[2, "dapo"]
    found = effects(root)
    for measure in ("area", "final", "length"):
        assert found["twice", measure] == {"mean": 0, "low": 0, "high": 0, "p_value": 1}
    last = {f: [rows[seed, f][-1]["eval/heldout"] for seed in (1, 2)] for f in ("fipo", "dapo")}
    assert found["fipo", "final"]["mean"] == pytest.approx((sum(last["fipo"]) - sum(last["dapo"])) / 2)
    table = (root / "compare.md").read_text()
    assert json.loads((root / "compare.json").read_text())["arms"]["fipo"] == "--fipo-preset 7b"
    assert (root / "report.html").exists() and str(root / "report.html") in output

    # Nothing is run again for another baseline; another seed is added.
    (root / "seed-1/fipo/summary.json").unlink()
    more = ("--results", str(tmp_path / "more"), "--baseline", "fipo")
    output = command("compare", *NULL, "--seeds", "3", "--save", str(root), *more).stdout
    assert "9 of 15 runs are finished already" in output and "15 of 15 runs: " in output
    assert (root / "compare.md").read_text() == table
    assert set(arm for arm, _ in effects(tmp_path / "more")) == {"dapo", "twice", "others"}
    again = command("compare", *NULL, "--seeds", "2", "--save", str(root)).stdout
    assert "10 of 10 runs are finished already" in again and (root / "compare.md").read_text() == table

    other = command("compare", *NULL, "--seeds", "2", "--save", str(root), "--lr", "2e-3", check=False)
    assert other.returncode == 2 and "belongs to a run with another --lr" in other.stderr
    assert (root / "compare.md").read_text() == table


def test_own_held_out_data_and_records(command, tmp_path):
    """The results read the metrics under the name that the data was given; each run records into its own folder."""
    flags = [*micro_flags(tmp_path), "--demo-data", str(tmp_path / "demo.jsonl"), "--label-key", "answer"]
    rows = [{"prompt": f"{i}=", "answer": "", "response": ""} for i in range(4)]
    for name in ("micro.jsonl", "demo.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    root = tmp_path / "study"
    arms = arm_flags(dapo=DAPO, fipo="--fipo-preset 32b")
    command("compare", *flags, *arms, "--seeds", "1", "--save", str(root), "--fipo-record", str(root))
    with (root / "curves.csv").open(newline="") as file:
        curves = list(csv.DictReader(file))
    for folder in ("dapo", "fipo"):
        evaluations = [row for row in metrics_without_times(root / "seed-1" / folder) if "eval/step" in row]
        written = [(int(c["rollouts"]), float(c["accuracy"])) for c in curves if c["arm"] == folder]
        assert written == [(row["eval/step"], row["eval/micro"]) for row in evaluations]
        found = read_records(root / "seed-1" / folder / "records")
        assert found.missing == [] and {record.header.rollout_id for record in found.records} == {0}


def test_bad_input(command, tmp_path):
    result = command("compare", *NULL, "--lr", "-1", "--save", str(tmp_path / "study"), check=False)
    assert result.returncode == 2 and "--lr" in result.stderr and len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "study").exists()


def test_a_run_that_fails_is_named(command, tmp_path):
    arms = arm_flags(dapo=DAPO, wild=f"{DAPO} --lr 1e18")
    flags = (*TINY.split(), *arms, "--seeds", "1", "--save", str(tmp_path / "study"))
    result = command("compare", *flags, check=False)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert "seed 1, wild: training diverged" in result.stderr


def test_a_planted_effect_is_found_and_a_planted_null_is_not(command, tmp_path):
    """Base models answer with one of four digits, and one of them is right: a task without luck of its own."""
    rows = [{"prompt": f"{i}=", "label": "3", "response": str((i + j) % 4)} for i in range(8) for j in range(4)]
    data = tmp_path / "digits.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [
        *MICRO.split(),
        *("--prompt-data", str(data), "--eval-prompt-data", "digits", str(data), "--demo-data", str(data)),
        *("--demo-steps", "60", "--demo-batch-size", "32", "--demo-lr", "1e-2", "--rollout-max-response-len", "3"),
        *("--rollout-batch-size", "8", "--n-samples-per-prompt", "8", "--global-batch-size", "16"),
        *("--num-rollout", "10", "--n-samples-per-eval-prompt", "8", "--save-interval", "10", "--lr", "2e-3"),
        *arm_flags(dapo=DAPO, others=f"{DAPO} --sampling-stream 1", half=f"{DAPO} --lr 1e-3"),
    ]
    command("compare", *flags, "--seeds", "6", "--save", str(tmp_path / "study"))
    found = effects(tmp_path / "study")
    half, others = found["half", "area"], found["others", "area"]
    assert half["high"] < 0 and half["p_value"] == pytest.approx(2 / 2**6)
    # Another machine draws otherwise, so more than 95% of its nulls must pass here: 10 standard errors would not.
    assert others["mean"] != 0 and abs(others["mean"]) < others["high"] - others["low"]
    assert others["low"] > half["high"]


def wait_until(condition, what: str, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


def test_kill_in_the_middle_of_two_runs(command, tmp_path):
    flags = [*TINY.split(), "--num-rollout", "6", *arm_flags(dapo=DAPO, fipo="--fipo-preset 7b"), "--workers", "2"]
    undisturbed, root = tmp_path / "undisturbed", tmp_path / "study"
    command("compare", *flags, "--seeds", "2", "--save", str(undisturbed))

    def halfway() -> list[Path]:
        """Runs that have trained on some rollouts and are not finished."""
        begun = {file.parent for file in root.glob("seed-*/*/metrics.jsonl") if "rollout/step" in file.read_text()}
        return [run for run in begun if run.name != "base" and not (run / "summary.json").exists()]

    study = subprocess.Popen(
        [sys.executable, "-m", "slime_fipo.cli", "compare", *flags, "--seeds", "2", "--save", str(root)],
        cwd=Path(__file__).parents[3],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    wait_until(lambda: len(halfway()) == 2 or study.poll() is not None, "two runs side by side")
    assert study.poll() is None
    study.send_signal(signal.SIGKILL)
    study.wait()
    left = halfway()
    assert len(left) == 2 and not (root / "compare.md").exists()

    output = command("compare", *flags, "--seeds", "2", "--save", str(root)).stdout
    assert " of 6 runs are finished already" in output
    for name in ("curves.csv", "effects.csv"):
        assert (root / name).read_bytes() == (undisturbed / name).read_bytes()
    tables = [(folder / "compare.md").read_text().replace(str(folder), "") for folder in (root, undisturbed)]
    assert tables[0] == tables[1]
