"""A rehearsal's processes end with it, however it ends, and no others do."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slime_fipo.rehearsal import keeper
from slime_fipo.rehearsal.cluster import MARK

REPOSITORY = Path(__file__).resolve().parents[2]
SLEEP = "import time; time.sleep(600)"
DEAF = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEP}"
# Loses its mark and is its child's only link to the rehearsal.
UNMARKED_CHILD = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SLEEP!r}], env={{}})"
HOLDER = f"""
import os, subprocess, sys
from pathlib import Path
from slime_fipo.rehearsal.cluster import MARK, _end, _start_keeper

folder = Path(sys.argv[1])
keeper = _start_keeper(folder)
environment = {{**os.environ, MARK: str(folder)}}
for code in ({SLEEP!r}, {DEAF!r}, {UNMARKED_CHILD!r}):
    subprocess.Popen([sys.executable, "-c", code], env=environment)
print(keeper.pid, flush=True)
sys.stdin.read()
_end(keeper)
"""


def wait_until(condition, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("end", ["close", "kill"])
def test_all_processes_of_a_rehearsal_end_with_it(tmp_path, end):
    folder, other = tmp_path / "rehearsal", tmp_path / "rehearsal-2"
    folder.mkdir()
    bystanders = [
        subprocess.Popen([sys.executable, "-c", SLEEP], env={**os.environ, **extra})
        for extra in ({}, {MARK: str(other)}, {"OTHER": f"{MARK}={folder}"})
    ]
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=REPOSITORY,
        start_new_session=True,
    )
    try:
        keeper_pid = int(holder.stdout.readline())
        wait_until(lambda: len(keeper.processes(str(folder))) == 4)
        if end == "kill":
            os.killpg(holder.pid, signal.SIGKILL)  # the keeper is in a session of its own
        else:
            holder.stdin.close()
        wait_until(lambda: not keeper.processes(str(folder)) and not folder.exists())
        wait_until(lambda: keeper._stat(keeper_pid) is None)
        assert all(process.poll() is None for process in bystanders)
    finally:
        keeper.end(str(folder))
        for process in (*bystanders, holder):
            process.kill()
            process.wait()


def test_a_number_given_to_another_process_meanwhile_is_left_alone():
    process = subprocess.Popen([sys.executable, "-c", SLEEP])
    try:
        _, start = keeper._stat(process.pid)
        keeper._signal((process.pid, str(int(start) - 1)), signal.SIGKILL)
        keeper._signal((process.pid, start), 0)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
