"""Whole runs in processes of their own: SIGKILL and resumption, damage, refusals, and what a run leaves behind."""

import fcntl
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from .rig import metrics_without_times

# Runs before the command and ends its own process with SIGKILL when FUNCTION is called for the NTH time.
KILL = """
import os, signal
import slime_fipo.local.{module} as module
original, calls = module.{function}, 0
def kill(*args, **kwargs):
    global calls
    calls += 1
    if calls == {nth}:
        {before}
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
module.{function} = kill
"""
HALF_A_FILE = """original(*args, **kwargs); os.truncate(args[1], os.path.getsize(args[1]) // 2)"""
MOMENTS = {
    "base training before its first checkpoint": ("engine", "demonstration_step", 73, "pass"),
    "base training after a checkpoint": ("engine", "demonstration_step", 111, "pass"),
    "sampling": ("rollout", "generate", 5, "pass"),
    "training on a rollout": ("training", "apply_gradient", 127, "pass"),
    "between metrics and their checkpoint": ("engine", "save_checkpoint", 4, "pass"),
    "writing a checkpoint": ("checkpoint", "save_file", 4, HALF_A_FILE),
    "the picture": ("engine", "write_picture", 1, "pass"),
    "the page": ("engine", "write_report", 1, "pass"),
}


@pytest.fixture(scope="module")
def undisturbed(local, tmp_path_factory):
    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    return directory, local("--save", str(directory)).stdout


def test_what_a_run_leaves_behind_is_what_it_says(undisturbed):
    directory, output = undisturbed
    rows = metrics_without_times(directory)
    assert [row["rollout/step"] for row in rows if "rollout/step" in row] == [0, 1, 2]
    evaluations = [row for row in rows if "eval/step" in row]
    assert [row["eval/step"] for row in evaluations] == [0, 2, 3]
    assert all(row["fipo/influence_deviation"] > 0 for row in rows if "rollout/step" in row)

    for name, row in (("before", evaluations[0]), ("after", evaluations[-1])):
        lines = [json.loads(line) for line in (directory / f"transcripts/{name}.jsonl").read_text().splitlines()]
        rewards = [float(line["response"].rsplit(";")[-1] == line["label"] and not line["truncated"]) for line in lines]
        assert sum(rewards) / len(rewards) == row["eval/heldout"]
        assert f"{row['eval/heldout']:.3f}" in output
    args = json.loads((directory / "args.json").read_text())
    assert args["args"]["lr"] == 1e-3 and args["fipo"]["decay_rate"] == 32.0
    assert (directory / "training.png").read_bytes().startswith(b"\x89PNG")
    assert f"page to open in a browser: {directory / 'report.html'}" in output
    assert (directory / "report.html").read_text().startswith("<!doctype html>")
    assert "progress" not in output and "\r" not in output and "\x1b" not in output
    for line in output.splitlines():
        if str(directory) in line:
            assert os.path.exists(line.split(": ", 1)[1])


def test_tensorboard_shows_every_number_once(undisturbed):
    directory, _ = undisturbed
    events = EventAccumulator(str(directory / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    shown = [(name, e.step) for name in events.Tags()["scalars"] for e in events.Scalars(name)]
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert len(shown) == len(set(shown)) == sum(map(len, rows))


@pytest.mark.parametrize("moment", MOMENTS)
def test_sigkill_and_the_same_command_again(local, undisturbed, tmp_path, moment):
    module, function, nth, before = MOMENTS[moment]
    code = KILL.format(module=module, function=function, nth=nth, before=before)
    killed = local("--save", str(tmp_path / "run"), code=code, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    local("--save", str(tmp_path / "run"))
    assert metrics_without_times(tmp_path / "run") == metrics_without_times(undisturbed[0])
    assert (tmp_path / "run/report.html").exists()
    for name in ("transcripts/before.jsonl", "transcripts/after.jsonl", "summary.json"):
        assert (tmp_path / "run" / name).read_text() == (undisturbed[0] / name).read_text()


def test_damaged_newest_checkpoint(local, undisturbed, tmp_path):
    code = KILL.format(module="engine", function="write_picture", nth=1, before="pass")
    local("--save", str(tmp_path / "run"), code=code, check=False)
    newest = tmp_path / "run/checkpoints/rollouts_0000003.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1000])
    again = local("--save", str(tmp_path / "run"))
    assert "rollouts_0000003.safetensors cannot be read" in again.stdout
    assert "continuing from the one before" in again.stdout
    assert "rollouts 3/3" in again.stdout and "rollouts 2/3" not in again.stdout
    assert metrics_without_times(tmp_path / "run") == metrics_without_times(undisturbed[0])


def test_a_finished_run_is_left_alone(local, undisturbed):
    directory, output = undisturbed
    before = {p: p.stat().st_mtime_ns for p in directory.rglob("*") if p.name != ".lock"}
    again = local("--save", str(directory))
    assert "is finished; nothing was run" in again.stdout
    assert again.stdout.splitlines()[1:] == output.splitlines()[-len(again.stdout.splitlines()) + 1 :]
    assert before == {p: p.stat().st_mtime_ns for p in directory.rglob("*") if p.name != ".lock"}


def test_load_starts_from_another_run(local, undisturbed, tmp_path):
    """slime's meaning: weights, optimizer and rollout counter go on; the configuration may differ."""
    result = local("--load", str(undisturbed[0]), "--save", str(tmp_path / "run"), "--num-rollout", "5")
    rows = metrics_without_times(tmp_path / "run")
    assert [row["rollout/step"] for row in rows if "rollout/step" in row] == [3, 4]
    last = [row for row in metrics_without_times(undisturbed[0]) if "eval/step" in row][-1]
    assert rows[0] == last and "base training" not in result.stdout


@pytest.fixture
def refused(local):
    def refused(*argv, says: str) -> None:
        """One line on stderr, nothing on stdout, exit code 2."""
        result = local(*argv, check=False)
        assert result.returncode == 2, result.stdout + result.stderr
        assert len(result.stderr.splitlines()) == 1 and says in result.stderr
        assert result.stdout == ""

    return refused


def test_another_configuration_is_refused_and_named(refused, undisturbed):
    directory, _ = undisturbed
    before = {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()}
    refused("--save", str(directory), "--lr", "2e-3", "--fipo-preset", "7b", says="--fipo-preset, --lr")
    assert before == {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_changed_data_is_another_configuration(local, refused, tmp_path):
    data, save = tmp_path / "prompts.jsonl", str(tmp_path / "run")
    data.write_text('{"prompt": "1+2=", "label": "3"}\n')
    files = ("--prompt-data", str(data), "--eval-prompt-data", "mine", str(data))
    local(*files, "--save", save, "--num-rollout", "0", "--demo-steps", "1")
    data.write_text('{"prompt": "1+2=", "label": "4"}\n')
    refused(
        *files,
        "--save",
        save,
        "--num-rollout",
        "0",
        "--demo-steps",
        "1",
        says="another --eval-prompt-data, --prompt-data",
    )


def test_a_second_process_is_refused(refused, undisturbed):
    with open(undisturbed[0] / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused("--save", str(undisturbed[0]), says="another process is using this run directory")


BAD = {
    "batch larger": (["--global-batch-size", "32"], "--global-batch-size is 32, more than a rollout's"),
    "batch does not divide": (["--global-batch-size", "5"], "--global-batch-size is 5; it must divide"),
    "steps do not divide": (["--num-steps-per-rollout", "3"], "--num-steps-per-rollout is 3; it must divide"),
    "one step": (["--global-batch-size", "16"], "one optimizer step per rollout"),
    "tau": (["--fipo-decay-rate", "0"], "--fipo-decay-rate"),
    "negative tau": (["--fipo-decay-rate", "-3"], "--fipo-decay-rate"),
    "lower clip": (["--fipo-clip-ratio-low", "1"], "--fipo-clip-ratio-low"),
    "clip shorthand 0": (["--fipo-clip-ratio", "0"], "--fipo-unclipped"),
    "c": (["--fipo-dual-clip-c", "1.28"], "--fipo-dual-clip-c"),
    "fipo flag without fipo": (
        ["--loss-type", "policy_loss", "--fipo-decay-rate", "8"],
        "--fipo-decay-rate has no effect",
    ),
    "unknown flag": (["--lerning-rate", "1"], "--lerning-rate"),
    "no number": (["--lr", "fast"], "--lr"),
    "not a number": (["--lr", "nan"], "--lr"),
    "negative": (["--num-rollout", "-1"], "--num-rollout"),
    "group of one": (["--n-samples-per-prompt", "1", "--global-batch-size", "2"], "--n-samples-per-prompt is 1"),
    "alphabet": (["--alphabet", "0123456789"], "line 1: 'prompt' holds '+'"),
    "missing file": (["--prompt-data", "/no/such.jsonl"], "--prompt-data /no/such.jsonl"),
    "no GPU": (["--device", "cuda"], "--device cuda: torch finds no GPU"),
    "load": (["--load", "/no/such/run"], "--load /no/such/run"),
    "seed": (["--seed", "99999999999999999999"], "--seed: 99999999999999999999"),
    "temperature": (["--rollout-temperature", "1e-45"], "--rollout-temperature: 1e-45"),
    "name of the held-out data": (["--eval-prompt-data", "step", "/no/such"], "--eval-prompt-data 'step'"),
    "records without a folder": (["--fipo-record-samples", "3"], "without --fipo-record"),
}


if torch.cuda.is_available():
    del BAD["no GPU"]


@pytest.mark.parametrize("name", BAD)
def test_bad_input_leaves_nothing_behind(refused, tmp_path, name):
    flags, says = BAD[name]
    refused(*flags, "--save", str(tmp_path / "run"), says=says)
    assert not (tmp_path / "run").exists()


def test_malformed_file_is_refused(refused, tmp_path):
    data = tmp_path / "prompts.jsonl"
    data.write_text('{"prompt": "1=", "label": "1"}\n{"prompt": "1="}\n')
    refused("--prompt-data", str(data), "--save", str(tmp_path / "run"), says=f"{data}, line 2: no 'label'")
    assert not (tmp_path / "run").exists()


def test_unwritable_and_foreign_run_directories(refused, tmp_path):
    (tmp_path / "file").write_text("")
    refused("--save", str(tmp_path / "file" / "run"), says="cannot be written")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("x")
    refused("--save", str(foreign), says="not empty and not a run directory")
    assert [p.name for p in foreign.iterdir()] == ["thesis.tex"]


def test_own_data_over_an_own_alphabet(local, tmp_path):
    """Prompts and labels alone: the labels are the demonstrations. RL must not lose what they taught."""
    data = tmp_path / "reverse.jsonl"
    rows = [{"q": a + b + ">", "a": b + a} for a in "abc" for b in "abc"]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = local(
        *("--prompt-data", str(data), "--eval-prompt-data", "mine", str(data), "--input-key", "q", "--label-key", "a"),
        *("--alphabet", "abc>", "--save", str(tmp_path / "run"), "--num-rollout", "4", "--demo-lr", "5e-3"),
    )
    rows = [row for row in metrics_without_times(tmp_path / "run") if "eval/step" in row]
    assert rows[0]["eval/mine"] > 0.3 and rows[-1]["eval/mine"] > rows[0]["eval/mine"] - 0.2, result.stdout


def test_nothing_to_learn_from_is_said_and_the_run_ends(local, tmp_path):
    data = tmp_path / "impossible.jsonl"
    data.write_text(json.dumps({"prompt": "1=", "label": "12345678901234567890"}) + "\n")
    result = local(
        *("--prompt-data", str(data), "--eval-prompt-data", "mine", str(data), "--demo-steps", "1"),
        *("--num-rollout", "1", "--save", str(tmp_path / "run")),
    )
    assert "every group of 4 sampling rounds had equal rewards" in result.stdout
    rows = metrics_without_times(tmp_path / "run")
    assert rows[-1]["eval/mine"] == 0 and not any(name.startswith("train/") for row in rows for name in row)


def test_divergence_is_said(local, tmp_path):
    result = local("--save", str(tmp_path / "run"), "--demo-lr", "1e17", check=False)
    assert result.returncode == 2 and "training diverged" in result.stderr and len(result.stderr.splitlines()) == 1


def test_help_shows_every_flag():
    command = [sys.executable, "-m", "slime_fipo.cli", "local", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    for flag in (
        "--prompt-data",
        "--loss-type",
        "--eps-clip-high",
        "--fipo-decay-rate",
        "--fipo-preset",
        "--num-layers",
    ):
        assert flag in text
    assert "(default: None)" not in text
