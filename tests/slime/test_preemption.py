"""SIGTERM under slime's real train loop: the rollout is finished, saved, and the run ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .conftest import REPOSITORY
from .test_parser import BATCH, FIPO, FLAGS, MODEL

WRAPPER = Path(__file__).parent / "train_without_gpus.py"
# Megatron asks for the GPU's architecture where tensor or context parallelism is on.
ASYNC = "--async-save --use-persistent-ckpt-worker --ckpt-format torch_dist"
SAVE = ["--save", "checkpoints", "--save-interval", "50"]  # the stand-ins write none
ONE_GPU = ["--tensor-model-parallel-size", "1", "--context-parallel-size", "1", "--num-rollout", "60"]


def start(slime: Path, megatron: Path, tmp_path: Path, *more: str, **variables: str) -> subprocess.Popen:
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    flags = [*FLAGS, *BATCH, *FIPO, *ONE_GPU, "--hf-checkpoint", str(tmp_path), "--ref-load", str(tmp_path)]
    flags += ["--debug-train-only", *more]
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env |= {"PYTHONPATH": os.pathsep.join(map(str, (slime, megatron, REPOSITORY))), "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    env["RAY_raylet_start_wait_time_s"] = "300"  # for busy machines
    return subprocess.Popen(
        [sys.executable, "-m", "slime_fipo", WRAPPER, slime / "train.py", tmp_path / "events", *flags],
        env=env | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def events(tmp_path: Path) -> list[str]:
    return (tmp_path / "events").read_text().splitlines() if (tmp_path / "events").exists() else []


def without_updates(seen: list[str]) -> list[str]:
    return [event for event in seen if event != "update"]


def terminate_in_the_third_rollout(process: subprocess.Popen, tmp_path: Path, *, updating: bool = False) -> str:
    """SIGTERM while it is generated, or while its weights are sent to the engines: then slime's question whether to
    save it is answered already."""

    def is_time() -> bool:
        seen = events(tmp_path)
        return "generate 2" in seen and (not updating or "update" in seen[seen.index("generate 2") :])

    deadline = time.monotonic() + 300
    while not is_time():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate(timeout=60)[0][-3000:]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    return process.communicate(timeout=120)[0]


def test_the_rollout_is_finished_and_saved(slime, megatron, tmp_path):
    """With ``--async-save`` too: slime's loops wait for the last rollout's checkpoint alone."""
    flags = [*SAVE, *ASYNC.split()]
    process = start(slime, megatron, tmp_path, *flags, SLIME_FIPO_SAVE_ON_SIGTERM="1")
    output = terminate_in_the_third_rollout(process, tmp_path)
    assert process.returncode == 143, output[-3000:]
    assert "SIGTERM: finishing this rollout, saving, and stopping" in output
    seen = without_updates(events(tmp_path))
    last = int(seen[-1].split()[-1])
    assert last in (2, 3), "it stops after the rollout in which the signal came"
    saved = [f"save {last}", f"checkpoint {last}", f"save data {last}"]
    assert seen == [f"generate {i}" for i in range(last + 1)] + saved


def test_what_was_not_to_be_saved_goes_on_to_the_next_checkpoint(slime, megatron, version, tmp_path):
    """Rollouts 1, 3, … are saved, and the signal comes after 2; ``--async-save`` completes one at the next save."""
    if version != "main":
        pytest.skip("one version is enough")
    flags = [*SAVE[:-1], "2", "--eval-interval", "1", "--eval-prompt-data", "held-out", str(tmp_path / "none.jsonl")]
    flags += ["--skip-eval-before-train", *ASYNC.split()]
    process = start(slime, megatron, tmp_path, *flags, SLIME_FIPO_SAVE_ON_SIGTERM="1")
    output = terminate_in_the_third_rollout(process, tmp_path, updating=True)
    assert process.returncode == 143, output[-3000:]
    assert "SIGTERM: stopping at the next complete checkpoint" in output
    seen = without_updates(events(tmp_path))
    after = seen[seen.index("generate 2") :]
    assert after == ["generate 2", "generate 3", "save 3", "checkpoint 1", "checkpoint 3", "save data 3"], seen
    assert "eval 1" in seen


def test_without_an_interval_it_says_that_nothing_is_saved(slime, megatron, version, tmp_path):
    if version != "main":
        pytest.skip("one version is enough")
    process = start(slime, megatron, tmp_path, SLIME_FIPO_SAVE_ON_SIGTERM="1")
    output = terminate_in_the_third_rollout(process, tmp_path)
    assert process.returncode == 143, output[-3000:]
    assert "no --save-interval: what it trained is not saved" in output
    assert "saving, and stopping" not in output
    assert not any(event.startswith("save") for event in events(tmp_path))


def test_without_the_variable_sigterm_is_slimes(slime, megatron, version, tmp_path):
    if version != "main":
        pytest.skip("one version is enough")
    process = start(slime, megatron, tmp_path, *SAVE)
    terminate_in_the_third_rollout(process, tmp_path)
    assert process.returncode not in (0, 143)
    assert not any(event.startswith("save") for event in events(tmp_path))
