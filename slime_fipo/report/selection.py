"""Which recorded responses go onto the page with all their tokens: few enough to open fast, and said in a sentence.

Every rollout and step gets its turn, the newest rollout and its last step first. Within a step whole groups are taken,
those with the most extreme response first, so that siblings can be compared.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from ..errors import UserError
from ..records import Fate, TokenRecord
from .inputs import Run


def extremeness(record: TokenRecord) -> tuple[bool, float]:
    """Sort key: dropped and non-finite responses above all, then the mean |f − 1| over trained tokens.

    Where f is not known, the mean |mismatch| takes its place.
    """
    trained = record.loss_mask & record.present
    broken = bool((record.fate & (Fate.DROPPED | Fate.NONFINITE)).any())
    distance = record.influence - 1 if record.influence is not None else record.mismatch
    if distance is None:
        return broken, 0.0
    known = np.abs(distance[trained & np.isfinite(distance)])
    return broken, float(known.mean()) if len(known) else 0.0


def select(
    runs: Sequence[Run], samples: int, rollouts: Sequence[int] = (), groups: Sequence[int] = ()
) -> tuple[list[tuple[int, TokenRecord]], str]:
    """Up to ``samples`` records of ``runs``, as (index of the run, record) in order, and a sentence that says which.

    Args:
        rollouts, groups: only these; empty: all.

    Raises:
        UserError: nothing was recorded of a rollout or group that was asked for.
    """
    everything = [(i, record) for i, run in enumerate(runs) for record in run.records]
    asked = everything
    for flag, wanted, value in (
        ("--rollout", rollouts, lambda record: record.header.rollout_id),
        ("--group", groups, lambda record: record.group),
    ):
        there = {value(record) for _, record in asked}
        absent = [number for number in wanted if number not in there]
        if absent:
            recorded = set().union(*(run.rollout_ids for run in runs)) if flag == "--rollout" else there
            raise UserError(f"{flag} {absent[0]} is not recorded; recorded are {_numbers(recorded) or 'none'}")
        if wanted:
            asked = [(i, record) for i, record in asked if value(record) in wanted]
    chosen = _round_robin(asked, samples)
    chosen = [pair for pair in asked if id(pair[1]) in chosen]
    if not everything:
        return [], "No token records were found, so single responses cannot be shown."
    sentence = f"{len(chosen)} of {len(everything)} recorded responses are on this page with all their tokens"
    limits = [f"rollout {_numbers(rollouts)}"] * bool(rollouts) + [f"group {_numbers(groups)}"] * bool(groups)
    if limits:
        sentence += f" ({' and '.join(limits)})"
    if len(chosen) < len(asked):
        sentence += ": of every recorded step the groups with the largest |f − 1|" if chosen else ""
        sentence += ". --samples, --rollout and --group choose others"
    return chosen, sentence + "."


def _round_robin(asked: list[tuple[int, TokenRecord]], samples: int) -> set[int]:
    """Ids of the chosen records."""
    steps: dict[tuple, dict[int, list]] = defaultdict(lambda: defaultdict(list))
    for i, record in asked:
        header = record.header
        steps[header.rollout_id, header.step_id, i][record.group].append((extremeness(record), record))
    queues = []
    for _, groups in sorted(steps.items(), key=lambda item: (-item[0][0], -item[0][1], item[0][2])):
        ranked = sorted(groups.values(), key=lambda members: max(key for key, _ in members), reverse=True)
        queues.append([sorted(members, key=lambda member: member[0], reverse=True) for members in ranked])
    chosen: set[int] = set()
    while len(chosen) < samples and any(queues):
        for queue in queues:
            if queue:
                chosen |= {id(record) for _, record in queue.pop(0)[: samples - len(chosen)]}
    return chosen


def _numbers(values) -> str:
    values = sorted(set(values))
    shown = ", ".join(map(str, values[:12]))
    return shown + (f", … {values[-1]}" if len(values) > 12 else "")
