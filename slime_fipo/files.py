"""The one way in which this package replaces a file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write(temporary path)`` write a file, then rename it to ``path``, both synced to disk.

    Whoever reads ``path`` sees the old file or the new one, also after a crash of the process or the machine. The
    temporary file stands in the same folder as ``.tmp-NAME``; one that a dead process left behind is overwritten.

    Raises:
        OSError: the file cannot be written; ``path`` is as it was, and the temporary file is gone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        write(temporary)
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
