"""What slime logged: the scalars of its TensorBoard events, and the history of wandb's offline runs.

wandb's package has a writer for its files and no reader.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

# A .wandb file: LevelDB's log format behind a header of wandb's own; sizes in bytes.
_FILE_HEADER, _BLOCK, _RECORD_HEADER = 7, 32768, 7
_WHOLE, _LAST_PART = 1, 4


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Metric -> its (step, value) pairs in the order of logging, over all event files in ``folder``."""
    scalars: dict[str, list[tuple[int, float]]] = {}
    for file in sorted(folder.rglob("events.out.tfevents.*")):  # the driver, rollout manager and trainer write one each
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            scalars.setdefault(tag, []).extend((event.step, event.value) for event in events.Scalars(tag))
    return scalars


def read_wandb(folder: Path) -> dict[str, list[float]]:
    """Metric -> its numbers in the order of logging, over all ``.wandb`` files in ``folder``."""
    from wandb.proto.wandb_internal_pb2 import Record

    metrics: dict[str, list[float]] = {}
    for file in sorted(folder.rglob("*.wandb")):
        for record in map(Record.FromString, _wandb_records(file.read_bytes())):
            for item in record.history.item:
                value = json.loads(item.value_json)
                if isinstance(value, (int, float)):
                    metrics.setdefault("/".join(item.nested_key) or item.key, []).append(value)
    return metrics


def _wandb_records(data: bytes) -> Iterator[bytes]:
    position, parts = _FILE_HEADER, []
    while position + _RECORD_HEADER <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < _RECORD_HEADER:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        position += _RECORD_HEADER
        parts.append(data[position : position + length])
        position += length
        if kind in (_WHOLE, _LAST_PART):
            yield b"".join(parts)
            parts = []
