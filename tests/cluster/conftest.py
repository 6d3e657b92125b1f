"""What the cluster tests share: short temporary directories, a run small enough to be started often, bystanders."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples" / "fipo"

# An embedded run of a second or so per rollout.
SMALL_RUN = (
    "--num-threads 1 --demo-steps 20 --rollout-batch-size 8 --n-samples-per-prompt 4 --global-batch-size 8"
    " --eval-interval 1000"
)


@pytest.fixture(scope="session", autouse=True)
def ray_is_installed():
    pytest.importorskip("ray.dashboard", reason="needs ray[default]: pip install '.[cluster]'")


@pytest.fixture(scope="module")
def short_directory():
    """A directory whose path leaves room for Ray's and munge's socket names."""
    path = Path(tempfile.mkdtemp(prefix="fipo", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module")
def bystander():
    """A process that a careless script would end: it looks like Ray, SGLang and a training process at once."""
    command = [sys.executable, "-c", "import time; time.sleep(3600)", "raylet gcs_server sglang ray:: train.py"]
    process = subprocess.Popen(command)
    yield process
    assert process.poll() is None, "a process that belongs to none of the scripts was ended"
    process.kill()
    process.wait()


def rollouts_of(save: Path) -> list[int]:
    """Numbers of the rollouts that an embedded run has logged, in order."""
    try:
        rows = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    except FileNotFoundError:
        return []
    return [row["rollout/step"] for row in rows if "rollout/step" in row]
