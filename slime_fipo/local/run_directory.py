"""The run directory: who may use it, and the files in it that are not checkpoints.

``args.json`` is the configuration, ``metrics.jsonl`` the one source of every number; TensorBoard events and the
picture are made from it. All files are either appended to and cut back on resumption, or replaced as a whole.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import time
from importlib.metadata import version
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from .. import files
from ..errors import UserError
from ..records.arguments import RECORD_DESTS
from ..report.metrics import METRICS_FILE, read_metrics
from .arguments import flag_of

_FILE_FLAGS = ("prompt_data", "eval_prompt_data", "demo_data", "load")  # compared by content, not by path


class RunDirectory:
    """Exclusive use of ``path`` for one configuration, until the process ends.

    Raises:
        UserError: the directory cannot be written, is in use, or belongs to another configuration.
    """

    def __init__(self, path: str, args: argparse.Namespace):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.metrics_file = self.path / METRICS_FILE
        self.summary_file = self.path / "summary.json"
        configuration = _configuration(args)
        try:
            self._check_configuration(configuration)  # before anything is created
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "w")  # noqa: SIM115 -- the lock lasts as long as the process
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not self._check_configuration(configuration):  # again: another process may have come first
                self.write_json("args.json", configuration)
        except BlockingIOError:
            raise UserError(f"--save {path}: another process is using this run directory") from None
        except OSError as error:
            raise UserError(f"--save {path}: cannot be written ({error.strerror}); choose another directory") from None

    def _check_configuration(self, configuration: dict) -> bool:
        """Whether the directory is this configuration's already; False if it is empty or absent."""
        file = self.path / "args.json"
        if not file.exists():
            # A process that died before args.json was in place leaves the lock and perhaps half of args.json.
            if self.path.is_dir() and any(p.name != ".lock" and not files.is_temporary(p) for p in self.path.iterdir()):
                raise UserError(f"--save {self.path}: not empty and not a run directory (no args.json); choose another")
            return False
        try:
            existing = json.loads(file.read_text())
            differing = [
                flag_of(name)
                for part in ("args", "sha256")
                for name in {**existing[part], **configuration[part]}
                if existing[part].get(name) != configuration[part].get(name)
            ]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"--save {self.path}: args.json is damaged; choose another directory") from None
        if differing:
            raise UserError(
                f"--save {self.path}: belongs to a run with another {', '.join(sorted(set(differing)))}; "
                "use the same or choose another directory"
            )
        return True

    def close(self) -> None:
        """Let other processes in."""
        self._lock.close()

    def write_json(self, name: str, value) -> None:
        self.write_text(name, json.dumps(value, indent=2) + "\n")

    def write_text(self, name: str, text: str) -> None:
        files.replace(self.path / name, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    # -- metrics --

    def start_metrics(self, keep_bytes: int) -> None:
        """Cut ``metrics.jsonl`` back to its first ``keep_bytes`` and make the TensorBoard events anew from what stays.

        Raises:
            UserError: fewer bytes are there than the checkpoint had seen.
        """
        kept = self.metrics_file.read_bytes() if self.metrics_file.exists() else b""
        if len(kept) < keep_bytes:
            raise UserError(f"{self.metrics_file} was shortened since its checkpoint; choose another --save")
        files.replace(self.metrics_file, lambda temporary: temporary.write_bytes(kept[:keep_bytes]))
        folder = self.path / "tensorboard"
        folder.mkdir(exist_ok=True)
        for file in folder.glob("events.out.tfevents.*"):
            file.unlink()
        self._events = folder / f"events.out.tfevents.{int(time.time())}"
        self._write_event(Event(wall_time=time.time(), file_version="brain.Event:2"))
        for row in self.metrics():
            self._to_tensorboard(row)

    def log(self, row: dict) -> None:
        """Append one row to ``metrics.jsonl`` and TensorBoard. One key is its step axis, such as ``eval/step``."""
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._to_tensorboard(row)

    def _to_tensorboard(self, row: dict) -> None:
        step = next(value for name, value in row.items() if name.endswith("/step"))
        values = [Summary.Value(tag=name, simple_value=value) for name, value in row.items()]
        self._write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def _write_event(self, event: Event) -> None:
        # Not by TensorBoard's own writer, whose thread meets a full disk with a traceback, and nobody hears of it.
        with self._events.open("ab") as file:
            RecordWriter(file).write(event.SerializeToString())

    def metrics(self) -> list[dict]:
        return read_metrics(self.metrics_file)

    def metrics_bytes(self) -> int:
        return self.metrics_file.stat().st_size


def _configuration(args: argparse.Namespace) -> dict:
    """What ``args.json`` holds: the flags that the run depends on, the content of files, the effective settings."""
    own = ("save", "fipo", "record", *RECORD_DESTS, *_FILE_FLAGS)
    flags = {name: value for name, value in vars(args).items() if name not in own}
    paths = {name: getattr(args, name) for name in _FILE_FLAGS}
    return {
        "args": flags,
        "files": paths,
        "sha256": {name: _content_hash(value) for name, value in paths.items()},
        "fipo": args.fipo.as_dict(),
        "versions": {name: version(name) for name in ("torch", "megatron-core")},
    }


def _content_hash(value) -> str | None:
    path = Path(value[1] if isinstance(value, list) else value) if value else None
    if path is None:
        return None
    name = f"{value[0]}:" if isinstance(value, list) else ""
    # A run directory to load from is known by its configuration: its newest checkpoint may be gone later.
    path = path / "args.json" if path.is_dir() else path
    return name + hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None
