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
ONE_GPU = ["--tensor-model-parallel-size", "1", "--context-parallel-size", "1", "--num-rollout", "60"]


def start(slime: Path, megatron: Path, tmp_path: Path, **variables: str) -> subprocess.Popen:
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    flags = [*FLAGS, *BATCH, *FIPO, *ONE_GPU, "--hf-checkpoint", str(tmp_path), "--ref-load", str(tmp_path)]
    flags += ["--save", str(tmp_path / "run"), "--save-interval", "50", "--debug-train-only"]
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


def terminate_in_the_third_rollout(process: subprocess.Popen, tmp_path: Path) -> str:
    deadline = time.monotonic() + 300
    while "generate 2" not in events(tmp_path):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate(timeout=60)[0][-3000:]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    return process.communicate(timeout=120)[0]


def test_the_rollout_is_finished_and_saved(slime, megatron, tmp_path):
    process = start(slime, megatron, tmp_path, SLIME_FIPO_SAVE_ON_SIGTERM="1")
    output = terminate_in_the_third_rollout(process, tmp_path)
    assert process.returncode == 143, output[-3000:]
    assert "SIGTERM: finishing this rollout, saving, and stopping" in output
    seen = events(tmp_path)
    last = int(seen[-1].split()[-1])
    assert last in (2, 3, 4), "it stops after the rollout in which the signal came"
    assert seen == [f"generate {i}" for i in range(last + 1)] + [f"save {last}", f"save data {last}"]


def test_without_the_variable_sigterm_is_slimes(slime, megatron, version, tmp_path):
    if version != "main":
        pytest.skip("one version is enough")
    process = start(slime, megatron, tmp_path)
    terminate_in_the_third_rollout(process, tmp_path)
    assert process.returncode not in (0, 143)
    assert not any(event.startswith("save") for event in events(tmp_path))
