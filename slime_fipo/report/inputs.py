"""What ``slime-fipo report`` is given: folders of several kinds, each read into runs of one shape.

A kind is a test of what stands in the folder and a reader; nothing else knows where a run came from.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UserError
from ..records import RecordSet, TokenRecord, read_records
from ..records.store import is_record_folder
from .metrics import METRICS_FILE, read_metrics

RECORDS = "records"  # in a run directory


@dataclass
class Run:
    """One training run, or what is there of it.

    Args:
        name: how the page calls it.
        rows: rows of metrics, each with a step axis (``rollout/step``, ``eval/step``); empty if there are none.
        records: token records, in order of rollout, step and position.
        missing: one sentence for each thing that should be there and is not.
    """

    name: str
    rows: list[dict] = field(default_factory=list)
    records: list[TokenRecord] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Kind:
    """A kind of folder: what it is called, how it is known, how it is read."""

    name: str
    matches: Callable[[Path], bool]
    read: Callable[[Path], list[Run]]


def _is_run(path: Path) -> bool:
    return (path / METRICS_FILE).is_file()


def _read_run(path: Path, name: str | None = None) -> list[Run]:
    records = path / RECORDS
    found = read_records(records) if is_record_folder(records) else RecordSet()
    return [Run(name or path.resolve().name, read_metrics(path / METRICS_FILE), found.records, found.missing)]


def _is_comparison(path: Path) -> bool:
    return any(path.glob(f"seed-*/*/{METRICS_FILE}"))


def _read_comparison(path: Path) -> list[Run]:
    """Every arm of every seed; the base models are where the arms begin, and have no rollouts."""
    runs = []
    for metrics in sorted(path.glob(f"seed-*/*/{METRICS_FILE}")):
        if metrics.parent.name != "base":
            runs += _read_run(metrics.parent, f"{metrics.parent.name}, {metrics.parent.parent.name}")
    planned = path / "compare.json"
    if not planned.exists():
        runs[0].missing.append(f"{path}: compare.json is missing, so the comparison has not finished")
    else:
        seeds = max((len(per_seed) for per_seed in json.loads(planned.read_text())["measures"].values()), default=0)
        present = len({run.name.rsplit(", ", 1)[1] for run in runs})
        if present < seeds:
            runs[0].missing.append(f"{path}: compare.json speaks of {seeds} seeds, {present} are here")
    return runs


def _read_records(path: Path) -> list[Run]:
    found = read_records(path)
    return [Run(path.resolve().name, [], found.records, found.missing)]


KINDS = (
    Kind("a run directory of slime-fipo local (metrics.jsonl)", _is_run, _read_run),
    Kind("slime-fipo compare (seed-*/)", _is_comparison, _read_comparison),
    Kind("token records of --fipo-record (rollout_*/step_*.safetensors)", is_record_folder, _read_records),
)


def read_inputs(paths: list[Path]) -> list[Run]:
    """The runs in ``paths``; names that clash are told apart by their folder.

    Raises:
        UserError: a path is not a folder, of no kind, or one of its files is damaged; the message names it.
    """
    runs = []
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path} is not a folder; give {_kinds()}")
        kind = next((kind for kind in KINDS if kind.matches(path)), None)
        if kind is None:
            raise UserError(f"{path} is none of these: {_kinds()}")
        found = kind.read(path)
        if {run.name for run in found} & {run.name for run in runs}:
            for run in found:
                run.name = f"{run.name} ({path})"
        runs += found
    return runs


def _kinds() -> str:
    *most, last = (kind.name for kind in KINDS)
    return f"{', '.join(most)}, or {last}"
