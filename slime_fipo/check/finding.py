"""What a rule of ``slime-fipo check`` says: one line that names the flag or the file and the fix."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """``error``: the run breaks or is another one than was asked for. ``warning``: it departs from the recipe."""

    severity: str
    message: str


def error(message: str) -> Finding:
    return Finding("error", message)


def warning(message: str) -> Finding:
    return Finding("warning", message)
