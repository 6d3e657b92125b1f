"""``python -I keeper.py FOLDER``: ends a rehearsal's processes and removes its folder once its standard input closes.

Whoever started the rehearsal holds the other end, so this also happens after a ``kill -9``. A process belongs to the
rehearsal if its environment says so or a parent of it did: nothing else is ever ended. Standard library alone, Linux.
"""

import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path

MARK = "SLIME_FIPO_REHEARSAL"
PATIENCE_S = 5.0  # between SIGTERM and SIGKILL


def _stat(pid: int) -> tuple[int, str] | None:
    """Parent and start time of a process that still runs."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else (int(fields[1]), fields[19])


def _is_marked(pid: int, mark: bytes) -> bool:
    try:
        return mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


def processes(folder: str) -> dict[int, str]:
    """Process id -> start time of every running process of the rehearsal in ``folder``."""
    mark = f"{MARK}={folder}".encode()
    running = {int(entry): _stat(int(entry)) for entry in os.listdir("/proc") if entry.isdigit()}
    running = {pid: stat for pid, stat in running.items() if stat is not None and pid != os.getpid()}
    found = {pid for pid in running if _is_marked(pid, mark)}
    while True:
        children = {pid for pid, (parent, _) in running.items() if parent in found} - found
        if not children:
            return {pid: running[pid][1] for pid in found}
        found |= children


def end(folder: str) -> None:
    """SIGTERM, and after a while SIGKILL, until no process of the rehearsal is left."""
    started, sent = time.monotonic(), set()
    while left := processes(folder):
        late = time.monotonic() - started > PATIENCE_S
        for process in left.items():
            if late or process not in sent:
                _signal(process, signal.SIGKILL if late else signal.SIGTERM)
                sent.add(process)
        time.sleep(0.2)


def _signal(process: tuple[int, str], number: int) -> None:
    pid, start = process
    stat = _stat(pid)
    if stat is not None and stat[1] == start:  # its number was not given to another meanwhile
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they are for the rehearsal, whose end is noticed by the pipe
    print("ready", flush=True)
    sys.stdin.buffer.read()
    end(sys.argv[1])
    shutil.rmtree(sys.argv[1], ignore_errors=True)
