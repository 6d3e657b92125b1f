"""What wandb wrote offline; its Python package has a writer for these files and no reader."""

import json
import struct
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

FILE_HEADER, BLOCK, RECORD_HEADER = 7, 32768, 7  # LevelDB's log format behind a header of wandb's own


def read_offline(folder: Path) -> dict[str, list[float]]:
    """Metric -> its numbers in the order of logging, over all ``.wandb`` files in ``folder``."""
    metrics: dict[str, list[float]] = {}
    for file in sorted(folder.rglob("*.wandb")):
        for record in map(Record.FromString, _records(file.read_bytes())):
            for item in record.history.item:
                value = json.loads(item.value_json)
                if isinstance(value, (int, float)):
                    metrics.setdefault("/".join(item.nested_key) or item.key, []).append(value)
    return metrics


def _records(data: bytes):
    position, parts = FILE_HEADER, []
    while position + RECORD_HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < RECORD_HEADER:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        position += RECORD_HEADER
        parts.append(data[position : position + length])
        position += length
        if kind in (1, 4):  # whole, or its last part
            yield b"".join(parts)
            parts = []
