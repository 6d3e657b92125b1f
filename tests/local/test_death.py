"""A run directory survives the death of its process at any moment, and a full disk: the same command ends the run.

A moment is a call by which the file system changes or is synced. ``EVERY_MOMENT=1`` tries all of a run, not a sample.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from safetensors import safe_open

from slime_fipo.local.checkpoint import _checksum

from .rig import metrics_without_times, micro_flags

# Before each command: checkpoints of base training too, and no time for drawing the picture.
SHORT = """
import slime_fipo.local.engine
import matplotlib.figure
slime_fipo.local.engine.DEMO_SAVE_INTERVAL = 2
matplotlib.figure.Figure.savefig = lambda self, path, **options: path.write_bytes(bytes(20_000))
"""
# Dies at the NTH moment in ROOT, and leaves one byte in COUNT for each.
DIE = """
import os, signal, sys
count, calls, fsync = os.open({count!r}, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 0, os.fsync
def moment():
    global calls
    calls += 1
    os.write(count, b"x")
    if calls == {nth}:
        os.kill(os.getpid(), signal.SIGKILL)
def hook(event, args):
    if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"):
        if str(args[0]).startswith({root!r}):
            moment()
def counted_fsync(descriptor):
    moment()
    fsync(descriptor)
sys.addaudithook(hook)
os.fsync = counted_fsync
"""
LIMIT = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
"""
FIRST, OTHERS = 8, 4  # moments that are always tried (the directory, its lock, args.json), and how many of the others


def left_behind(run: Path) -> dict:
    """Everything in a run directory that does not depend on the clock, by name."""
    found = {}
    for path in sorted(p for p in run.rglob("*") if p.is_file()):
        name = str(path.relative_to(run))
        if path.suffix == ".safetensors":  # safetensors keeps no order of its metadata
            with safe_open(path, framework="pt") as file:
                found[name] = _checksum({key: file.get_tensor(key) for key in file.keys()}, "")  # noqa: SIM118
        elif name == "metrics.jsonl":
            found[name] = metrics_without_times(run)
        elif name.startswith("tensorboard"):
            found["tensorboard"] = found.get("tensorboard", 0) + 1
        else:
            found[name] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def micro(command, tmp_path_factory):
    """``micro(run, code)`` runs ``slime-fipo local`` with records."""
    flags = micro_flags(tmp_path_factory.mktemp("data"))

    def micro(run: Path, code: str = "", check: bool = True):
        record = ("--fipo-record", str(run / "records"), "--fipo-record-interval", "1")
        return command("local", *flags, "--save", str(run), *record, code=SHORT + code, check=check)

    return micro


@pytest.fixture(scope="module")
def undisturbed(micro, tmp_path_factory) -> tuple[dict, int]:
    """What a run leaves, and its number of moments."""
    run, count = tmp_path_factory.mktemp("undisturbed") / "run", tmp_path_factory.mktemp("count") / "count"
    micro(run, DIE.format(root=str(run), nth=0, count=str(count)))
    return left_behind(run), count.stat().st_size


def test_death_at_any_moment(micro, undisturbed, tmp_path):
    whole, moments = undisturbed
    assert moments > 100 and any(row.get("train/grad_norm") for row in whole["metrics.jsonl"])
    chosen = range(1, moments + 1)
    if not os.environ.get("EVERY_MOMENT"):
        chosen = [*chosen[:FIRST], *chosen[FIRST :: moments // OTHERS]]
    for nth in chosen:
        run = tmp_path / str(nth) / "run"
        killed = micro(run, DIE.format(root=str(run), nth=nth, count=os.devnull), check=False)
        assert killed.returncode == -signal.SIGKILL, (nth, killed.stderr)
        there = sorted(str(path.relative_to(run)) for path in run.rglob("*")) if run.exists() else None
        again = micro(run, check=False)
        assert again.returncode == 0, (nth, there, again.stderr)
        assert left_behind(run) == whole, (nth, there)
        shutil.rmtree(run.parent)


def assert_one_line(result) -> None:
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr


@pytest.mark.parametrize("size", [1000, 20_000])
def test_a_file_that_cannot_grow(micro, undisturbed, tmp_path, size):
    """The nearest to a full disk that every machine has: args.json, metrics, a checkpoint, the picture do not fit."""
    run = tmp_path / "run"
    full = micro(run, LIMIT.format(size=size), check=False)
    assert_one_line(full)
    assert "File too large" in full.stderr and str(run) in full.stderr
    assert not [path for path in run.rglob(".tmp-*")]
    micro(run)
    assert left_behind(run) == undisturbed[0]


@pytest.fixture
def small_disk(tmp_path):
    """``small_disk(size)`` mounts a file system of that many bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = []

    def mount(size: int) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("a file system can be mounted by root alone")
        mounted.append(folder)
        return folder

    yield mount
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("size", [4096, 49_152])
def test_full_disk(micro, undisturbed, small_disk, size):
    run = small_disk(size) / "run"
    full = micro(run, check=False)
    assert_one_line(full)
    assert "No space left on device" in full.stderr
    assert not [path for path in run.rglob(".tmp-*")]
    subprocess.run(["mount", "-o", "remount,size=64m", str(run.parent)], check=True)
    micro(run)
    assert left_behind(run) == undisturbed[0]


LITTLE_MEMORY = """
import resource, torch
from slime_fipo.local.model import initialize_megatron
initialize_megatron(torch.device("cpu"), 1)  # gloo's threads reserve more than they use
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 2**27, now + 2**27))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="how much is in use is read from /proc")
def test_a_model_too_large_for_the_memory(command, tmp_path):
    flags = [*micro_flags(tmp_path), "--hidden-size", "4000", "--ffn-hidden-size", "8000"]  # 380 MB
    result = command("local", *flags, "--save", str(tmp_path / "run"), code=LITTLE_MEMORY, check=False)
    assert_one_line(result)
    assert "not enough memory" in result.stderr
