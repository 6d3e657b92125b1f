"""The one way in which this package replaces a file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

_TEMPORARY = ".tmp-"


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write(temporary path)`` write a file, then rename it to ``path``, both synced to disk.

    Whoever reads ``path`` sees the old file or the new one, also after a crash of the process or the machine. The
    temporary file stands in the same folder as ``.tmp-NAME``; one that a dead process left behind is overwritten.

    Raises:
        OSError: the file cannot be written; ``path`` is as it was, and the temporary file is gone. A full disk is one
            also where ``write`` is one of safetensors', which raises its own error for it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(_TEMPORARY + path.name)
    try:
        write(temporary)
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, SafetensorError):
            raise OSError(f"{path}: {str(error).splitlines()[0]}") from None
        raise
    _sync(path.parent)


def is_temporary(path: Path) -> bool:
    """Whether ``path`` is a file that :func:`replace` was writing when its process died."""
    return path.name.startswith(_TEMPORARY)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
