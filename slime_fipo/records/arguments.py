"""The flags of recording, one group for every host, and what they come down to.

As with FIPO's own flags, every default in the parser is None, so that a flag that was given can be told from one that
was not. What is recorded of a step is in ``choice.py``.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError

RECORD_DESTS = ("fipo_record", "fipo_record_samples", "fipo_record_interval")
DEFAULT_SAMPLES, DEFAULT_INTERVAL = 64, 10


@dataclass(frozen=True)
class RecordSettings:
    """What to record, and where.

    Args:
        folder: as the user gave it; a relative path stays relative.
        samples: at most this many responses of a recorded rollout, at least 1.
        interval: every ``interval``-th rollout is recorded, rollout 0 included; at least 1.
    """

    folder: Path
    samples: int
    interval: int


def add_record_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the group of recording flags to ``parser`` and return the parser."""
    group = parser.add_argument_group("FIPO records", "what the loss saw, token by token, for slime-fipo report")
    group.add_argument(
        "--fipo-record",
        metavar="DIR",
        default=None,
        help="folder for token records of each recorded rollout's first and last optimizer step (default: no records)",
    )
    group.add_argument(
        "--fipo-record-samples",
        type=int,
        default=None,
        help=f"record at most this many responses of a rollout, in whole groups (default: {DEFAULT_SAMPLES})",
    )
    group.add_argument(
        "--fipo-record-interval",
        type=int,
        default=None,
        help=f"record every that many rollouts, the first one included (default: {DEFAULT_INTERVAL})",
    )
    return parser


def record_settings(args: argparse.Namespace) -> RecordSettings | None:
    """The settings of a parsed namespace, or None where nothing is recorded.

    Missing attributes count as not given. A namespace that a host filled from a file works too.

    Raises:
        UserError: names the flag and what to do instead.
    """
    folder, *numbers = (getattr(args, dest, None) for dest in RECORD_DESTS)
    for flag, value in zip(("--fipo-record-samples", "--fipo-record-interval"), numbers, strict=True):
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{flag} is {value!r}; it must be an integer of at least 1")
        if folder is None:
            raise UserError(f"{flag} has no effect without --fipo-record DIR; add it or drop {flag}")
    if folder is None:
        return None
    if not isinstance(folder, str) or not folder or "\0" in folder:
        raise UserError(f"--fipo-record is {folder!r}; it must be the path of a folder")
    checkpoint = _checkpoint_around(Path(folder))
    if checkpoint is not None:
        raise UserError(f"--fipo-record {folder} is inside the checkpoint {checkpoint}; choose a folder outside of it")
    samples, interval = numbers
    return RecordSettings(Path(folder), samples or DEFAULT_SAMPLES, interval or DEFAULT_INTERVAL)


def _checkpoint_around(folder: Path) -> Path | None:
    """The checkpoint, Megatron's or one in safetensors, that ``folder`` is or lies in."""
    try:
        folder = folder.resolve()
        return next((f for f in (folder, *folder.parents) if _is_checkpoint(f)), None)
    except OSError as error:
        raise UserError(f"--fipo-record {folder}: {error.strerror}; choose another folder") from None


def _is_checkpoint(folder: Path) -> bool:
    named = re.fullmatch(r"iter_\d{7,}", folder.name)
    return bool(named) or any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "*.distcp"))
