"""Two rehearsals on one machine cannot choose the same ports."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slime_fipo.rehearsal import keeper, ports
from slime_fipo.rehearsal.cluster import MARK

REPOSITORY = Path(__file__).resolve().parents[2]
HOLDER = f"""
import os, subprocess, sys, time
from pathlib import Path
from slime_fipo.rehearsal import ports
from slime_fipo.rehearsal.cluster import _start_keeper

lock, folder = ports.reserve(), Path(sys.argv[1])
_start_keeper(folder, lock.fileno())
deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
child = subprocess.Popen(
    [sys.executable, "-c", deaf], env={{**os.environ, {MARK!r}: str(folder)}}, stdout=subprocess.PIPE
)
child.stdout.readline()
print(lock.getsockname()[1], flush=True)
time.sleep(600)
"""


def is_taken(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return True
    return False


def test_a_range_is_nobody_elses_until_it_is_closed():
    with ports.reserve() as one, ports.reserve() as other:
        firsts = [lock.getsockname()[1] for lock in (one, other)]
        assert len(set(firsts)) == 2 and set(firsts) <= set(ports.RANGES)
        assert all(map(is_taken, firsts))
    assert not any(map(is_taken, firsts))


def test_a_killed_rehearsals_ports_are_taken_while_its_processes_run(tmp_path):
    folder = tmp_path / "rehearsal"
    folder.mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, cwd=REPOSITORY, start_new_session=True
    )
    try:
        first = int(holder.stdout.readline())
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        taken = is_taken(first)
        assert taken or not keeper.processes(str(folder))
        deadline = time.monotonic() + 120
        while keeper.processes(str(folder)) or is_taken(first):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        keeper.end(str(folder))
        holder.kill()
        holder.wait()


@pytest.mark.slime
def test_slime_finds_ports_of_its_own_range_only(slime_root):
    """With the stand-ins as a rehearsal's processes get them, and every search that slime makes."""
    code = """
from slime.utils import http_utils, misc
print(misc.get_free_port(15000), misc.get_free_port(15000, 32), misc.get_free_port(20500),
      *(http_utils.find_available_port(start) for start in range(3000, 5000, 100)))
"""
    paths = (REPOSITORY / "slime_fipo" / "rehearsal" / "site", slime_root, REPOSITORY)
    environment = {**os.environ, MARK: "/nowhere", "PYTHONPATH": os.pathsep.join(map(str, paths))}

    def found(first: int) -> list[int]:
        command = [sys.executable, "-c", code]
        run = subprocess.run(
            command, capture_output=True, text=True, env={**environment, ports.VARIABLE: str(first)}, cwd="/"
        )
        assert run.returncode == 0, run.stderr
        return [int(port) for port in run.stdout.split()]

    with ports.reserve() as one, ports.reserve() as other:
        for lock in (one, other):
            first = lock.getsockname()[1]
            assert all(first < port < first + ports.SIZE for port in found(first))
