"""One response on the terminal, coloured by its influence weights."""

from __future__ import annotations

import re

import numpy as np
from rich.console import Console
from rich.style import Style
from rich.text import Text

from ..errors import UserError
from ..records import Fate, TokenRecord
from ..records.text import CONTINUATION, Decoders
from .inputs import Run
from .statistics import response_row

_BLUE, _ORANGE = (33, 102, 172), (179, 88, 6)  # below and above 1: the ends of a colour-blind safe diverging scale
_MARKS = (
    (Fate.CLIPPED_HIGH, "^", "clipped at the upper bound"),
    (Fate.CLIPPED_LOW, "_", "clipped at the lower bound"),
    (Fate.CAPPED, "!", "capped by the safety threshold"),
    (Fate.EXCLUDED, "x", "left out of Future-KL"),
    (Fate.NONFINITE, "?", "Δ is not finite"),
)


def parse_sample(sample: str) -> tuple[int | None, int]:
    """Rollout, if it is named, and position of ``POSITION`` or ``ROLLOUT:POSITION``.

    Raises:
        UserError: ``sample`` is neither.
    """
    match = re.fullmatch(r"(?:(\d+):)?(\d+)", sample)
    if match is None:
        raise UserError(f"--tokens {sample}: give POSITION or ROLLOUT:POSITION, as in 10:3")
    return match[1] and int(match[1]), int(match[2])


def find_response(runs: list[Run], sample: str) -> TokenRecord:
    """The record that ``sample`` names as in :func:`parse_sample`; of several rollouts and steps the last one.

    Raises:
        UserError: nothing was recorded there.
    """
    rollout, position = parse_sample(sample)
    records = [record for run in runs for record in run.records]
    recorded = set().union(*(run.rollout_ids for run in runs))
    if not recorded:
        raise UserError("--tokens needs token records, and none were found in these paths")
    if rollout is not None and rollout not in recorded:
        raise UserError(f"--tokens {sample}: rollout {rollout} is not recorded; recorded are {_few(recorded)}")
    records = [r for r in records if rollout is None or r.header.rollout_id == rollout]
    found = [r for r in records if r.position == position]
    if not found:
        recorded = {r.position for r in records}
        raise UserError(f"--tokens {sample}: no response at position {position}; recorded are {_few(recorded)}")
    return max(found, key=lambda record: (record.header.rollout_id, record.header.step_id))


def _few(numbers: set[int]) -> str:
    ordered = sorted(numbers)
    return ", ".join(map(str, ordered[:20])) + (", …" if len(ordered) > 20 else "")


def print_response(console: Console, record: TokenRecord, decoders: Decoders) -> None:
    """Print the response's facts, its tokens coloured by f (or by the mismatch, where f is not known), and a legend."""
    header, row = record.header, response_row(record)
    title = (
        f"rollout {header.rollout_id}, step {header.step_id} of {header.steps_per_rollout}, position {record.position}"
    )
    console.print(f"{title}, group {record.group}", style="bold", markup=False)
    facts = {
        "reward": row["reward"],
        "A": row["advantage"],
        "tokens": row["length"],
        "trained": row["trained"],
        "mean f": row["f"],
        "min f": row["f_min"],
        "max f": row["f_max"],
    }
    shown = [f"{name} {value:.4g}" for name, value in facts.items() if value is not None]
    if row["clipped"] is not None:
        shown.append(f"clipped {row['clipped']:.1%}")
    console.print("  ".join(shown), markup=False)
    if row["dropped"]:
        console.print("dropped by the sequence filter: its loss is 0", markup=False)
    decoder = decoders.of(header)
    for note in decoders.notes:
        console.print(note, markup=False)

    values, what = record.influence, "f"
    if values is None:
        values, what = record.mismatch, "mismatch"
    distance = np.zeros(len(record.tokens)) if values is None else np.nan_to_num(values - (1 if what == "f" else 0))
    trained = record.loss_mask & record.present
    limit = float(np.abs(distance[trained]).max(initial=0.0)) or 1.0
    text = Text(decoder.text(record.prompt), style="dim")
    used = set()
    for i, piece in enumerate(decoder.pieces(record.tokens)):
        style = Style(dim=True) if not trained[i] else _style(distance[i] / limit)
        if piece.kind != CONTINUATION:
            text.append(piece.text, style)
        for flag, mark, _ in _MARKS:
            if trained[i] and record.fate[i] & flag:
                used.add(flag)
                text.append(mark, Style(bold=True))
    console.print(text, soft_wrap=True)
    scale = Text("colour: ")
    for part in (-1, -0.5, 0, 0.5, 1):
        scale.append(f" {part * limit + (1 if what == 'f' else 0):.3g} ", _style(part))
    console.print(scale.append(f" {what}; dim: prompt and tokens that are not trained"))
    for flag, mark, meaning in _MARKS:
        if flag in used:
            console.print(f"{mark} behind a token: {meaning}", markup=False)


def _style(part: float) -> Style:
    """Background for a value in [-1, 1]; small ones are left as they are."""
    strength = min(1.0, abs(part))
    if strength < 0.1:
        return Style()
    end = _ORANGE if part > 0 else _BLUE
    r, g, b = (round(255 + (c - 255) * strength) for c in end)
    return Style(bgcolor=f"#{r:02x}{g:02x}{b:02x}", color="black" if strength < 0.6 else "white")
