"""Record files: one safetensors file per rank and optimizer step, and their reader, which merges the ranks again.

A file holds its responses packed end to end. A context-parallel rank holds some spans of each response; all it writes
per token is of those spans, which it names. Every header says what a complete step needs, so that what is missing can
be named.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .. import files
from ..errors import UserError
from .schema import Fate, StepHeader, TokenRecord

FORMAT, VERSION = "slime_fipo.token_records", 1

# Per token of the spans that a rank holds -> dtype on disk. The last three may be absent.
_PER_TOKEN = {
    "tokens": np.int32,
    "loss_mask": np.bool_,
    "shift": np.float32,
    "advantages": np.float32,
    "fate": np.uint8,
    "future_kl": np.float32,
    "influence": np.float32,
    "mismatch": np.float32,
}
_OPTIONAL = ("future_kl", "influence", "mismatch")
_PER_RESPONSE = {
    "position": np.int64,
    "group": np.int64,
    "reward": np.float64,
    "prompt_length": np.int64,
    "response_length": np.int64,
}


def step_file(folder: Path, header: StepHeader) -> Path:
    """Where :func:`write_step` puts that rank's file."""
    name = f"step_{header.step_id:04d}.dp{header.dp_rank:04d}_cp{header.cp_rank:02d}.safetensors"
    return folder / f"rollout_{header.rollout_id:07d}" / name


def write_step(
    folder: Path,
    header: StepHeader,
    records: Sequence[TokenRecord],
    spans: Sequence[Sequence[tuple[int, int]]] | None = None,
) -> Path:
    """Write one rank's records of one step, atomically.

    Args:
        records: whole responses. With ``spans``, entries outside a response's spans are not looked at.
        spans: per response the ranges [start, end) of its tokens that this rank holds, in order; None: all of them.

    Returns:
        The file, :func:`step_file`.

    Raises:
        OSError: it cannot be written.
    """
    if spans is None:
        spans = [[(0, len(record.tokens))] for record in records]
    own = [np.concatenate([np.arange(*span) for span in held] or [np.arange(0)]) for held in spans]
    tensors = {
        "position": [r.position for r in records],
        "group": [r.group for r in records],
        "reward": [r.reward for r in records],
        "prompt_length": [len(r.prompt) for r in records],
        "response_length": [len(r.tokens) for r in records],
    }
    tensors = {name: np.asarray(values, dtype=_PER_RESPONSE[name]) for name, values in tensors.items()}
    tensors["span_count"] = np.asarray([len(held) for held in spans], dtype=np.int64)
    tensors["spans"] = np.asarray([edge for held in spans for span in held for edge in span], dtype=np.int64)
    tensors["prompt"] = _packed([r.prompt for r in records], np.int32)
    for name, dtype in _PER_TOKEN.items():
        values = [getattr(record, name) for record in records]
        if name in _OPTIONAL and any(value is None for value in values):
            continue
        tensors[name] = _packed([np.asarray(v)[i] for v, i in zip(values, own, strict=True)], dtype)
    metadata = {"format": FORMAT, "version": str(VERSION), "header": json.dumps(header.as_dict())}
    path = step_file(folder, header)
    files.replace(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))
    return path


def _packed(parts: list, dtype) -> np.ndarray:
    return np.concatenate([np.asarray(part, dtype=dtype) for part in parts]) if parts else np.zeros(0, dtype=dtype)


@dataclass
class RecordSet:
    """Records of any number of rollouts and steps, merged over ranks.

    Args:
        records: in order of rollout, step and position; each carries its step's header (of whichever rank came first).
        missing: one sentence for each rank, shard or step that should be there and is not.
    """

    records: list[TokenRecord] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def is_record_folder(path: Path) -> bool:
    """Whether ``path`` holds record files of :func:`write_step`."""
    return any(path.glob("rollout_*/step_*.safetensors"))


def read_records(folder: Path) -> RecordSet:
    """All records under ``folder``.

    Raises:
        UserError: no record files, or one of them is damaged or not of this format; the message names it.
    """
    paths = sorted(folder.glob("rollout_*/step_*.safetensors"))
    if not paths:
        raise UserError(
            f"{folder} holds no token records (rollout_*/step_*.safetensors); give the --fipo-record folder"
        )
    steps = defaultdict(list)
    for path in paths:
        header, shards = _read_file(path)
        steps[header.rollout_id, header.step_id].append((header, shards))
    found = RecordSet()
    for (rollout, step), ranks in sorted(steps.items()):
        found.missing += _missing_ranks(rollout, step, [header for header, _ in ranks])
        found.records += _merge(ranks, found.missing)
    for rollout in sorted({rollout for rollout, _ in steps}):
        last = next(ranks[0][0].steps_per_rollout - 1 for (r, _), ranks in steps.items() if r == rollout)
        for step in sorted({0, last} - {s for r, s in steps if r == rollout}):
            found.missing.append(f"rollout {rollout}: step {step} of {last + 1} is missing")
    return found


def _missing_ranks(rollout: int, step: int, headers: list[StepHeader]) -> list[str]:
    there = {(h.dp_rank, h.cp_rank) for h in headers}
    expected = {(dp, cp) for dp in range(headers[0].dp_size) for cp in range(headers[0].cp_size)}
    return [
        f"rollout {rollout}, step {step}: the file of data-parallel rank {dp}, context-parallel rank {cp} is missing"
        for dp, cp in sorted(expected - there)
    ]


def _read_file(path: Path) -> tuple[StepHeader, list[tuple[TokenRecord, list[tuple[int, int]]]]]:
    """One rank's header, and each response with the spans that the rank holds (zeros elsewhere)."""
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata.get("format") != FORMAT:
            raise ValueError("not a token record")
        if metadata.get("version") != str(VERSION):
            raise ValueError(f"format version {metadata.get('version')}, this slime-fipo reads {VERSION}")
        header = StepHeader.from_dict(json.loads(metadata["header"]))
        return header, list(_unpacked(header, tensors))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, IndexError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} cannot be read ({reason}); delete it to leave that rank's records out") from None


def _unpacked(header: StepHeader, tensors: dict[str, np.ndarray]):
    prompt_at = token_at = span_at = 0
    for i, length in enumerate(tensors["response_length"].tolist()):
        prompt_end = prompt_at + int(tensors["prompt_length"][i])
        span_end = span_at + int(tensors["span_count"][i])
        spans = [tuple(map(int, edges)) for edges in tensors["spans"].reshape(-1, 2)[span_at:span_end]]
        own = np.concatenate([np.arange(*span) for span in spans] or [np.arange(0)]).astype(np.int64)
        if length < 0 or (len(own) and not (own.min() >= 0 and own.max() < length)):
            raise ValueError("its spans lie outside of its responses")
        values = {}
        for name, dtype in _PER_TOKEN.items():
            if name not in tensors:
                values[name] = None
                continue
            values[name] = np.zeros(length, dtype=dtype)
            values[name][own] = tensors[name][token_at : token_at + len(own)]
        present = np.zeros(length, dtype=bool)
        present[own] = True
        record = TokenRecord(
            position=int(tensors["position"][i]),
            group=int(tensors["group"][i]),
            reward=float(tensors["reward"][i]),
            prompt=tensors["prompt"][prompt_at:prompt_end],
            present=present,
            header=header,
            **values,
        )
        yield record, spans
        prompt_at, token_at, span_at = prompt_end, token_at + len(own), span_end


def _merge(ranks: list, missing: list[str]) -> list[TokenRecord]:
    """Join what context-parallel ranks hold of the same response."""
    merged: dict[int, TokenRecord] = {}
    for _, shards in ranks:
        for record, spans in shards:
            known = merged.setdefault(record.position, record)
            if known is record:
                continue
            for name in _PER_TOKEN:
                if getattr(known, name) is None or getattr(record, name) is None:
                    setattr(known, name, None)
                    continue
                for start, end in spans:
                    getattr(known, name)[start:end] = getattr(record, name)[start:end]
            known.present |= record.present
    for position, record in sorted(merged.items()):
        absent = int((~record.present).sum())
        if absent:
            header = record.header
            missing.append(
                f"rollout {header.rollout_id}, step {header.step_id}, response {position}: {absent} of"
                f" {len(record.tokens)} tokens are missing"
            )
            record.fate[~record.present] = Fate.MASKED
    return [merged[position] for position in sorted(merged)]
