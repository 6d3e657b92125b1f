"""``metrics.jsonl``: a run's numbers over its rollouts, one JSON object a line, each with one step axis
(``rollout/step``, ``eval/step``, ``demo/step``). The one reader of that file, for whoever shows it.
"""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import UserError

METRICS_FILE = "metrics.jsonl"


def read_metrics(path: Path) -> list[dict]:
    """All rows of a ``metrics.jsonl``.

    Raises:
        UserError: a line is not a JSON object; the message names file and line.
    """
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number} is not a JSON object; delete that line")
        rows.append(row)
    return rows


def series(rows: list[dict], axis: str, name: str) -> tuple[list, list]:
    """Values of ``axis`` and ``name`` of the rows in which both are numbers."""
    points = [(row[axis], row[name]) for row in rows if _is_number(row.get(axis)) and _is_number(row.get(name))]
    return [x for x, _ in points], [y for _, y in points]


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def eval_name(rows: list[dict]) -> str:
    """The held-out set's metric, such as ``eval/heldout``."""
    row = next(row for row in rows if "eval/step" in row)
    return next(name for name in row if name.startswith("eval/") and name != "eval/step")
