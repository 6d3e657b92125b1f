"""Reads one value of a setting: never by truthiness, and never a text where a number belongs.

Values of flags have passed argparse; those of slime's YAML files have not, and YAML 1.1 takes ``28e-2`` for a text.
Which settings there are is for ``arguments.py``; the files are read in ``config_files.py``.
"""

from __future__ import annotations

import argparse
import math
import numbers
from typing import Any

from ..errors import UserError

TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def flag_of(dest: str) -> str:
    return "--" + dest.replace("_", "-")


def dest_of(flag: str) -> str:
    return flag[2:].replace("-", "_")


def read_boolean(name: str, value: Any) -> bool:
    """``value`` as a boolean: true, false, 0, 1, or one of YAML's words for them as text.

    Raises:
        UserError: anything else.
    """
    word = value.strip().lower() if isinstance(value, str) else str(value).lower() if type(value) in (bool, int) else ""
    if word not in (*TRUE, *FALSE):
        raise UserError(f"{flag_of(name)} is {value!r}; write {name}: true or false")
    return word in TRUE


def require_boolean(name: str, value: Any) -> None:
    """For a setting of slime's, which itself goes by truthiness: only true and false mean what they say."""
    if isinstance(value, bool):
        return
    if isinstance(value, str) and value.strip().lower() in (*TRUE, *FALSE):
        meant = str(read_boolean(name, value)).lower()
        raise UserError(f"{flag_of(name)} is the text {value!r}, which slime takes for true; write {name}: {meant}")
    raise UserError(f"{flag_of(name)} is {value!r}; write {name}: true or false")


def require_number(name: str, value: Any) -> None:
    if isinstance(value, str):
        _refuse_text(name, value, "a number", _as_number(value))
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise UserError(f"{flag_of(name)} is {value!r}; it must be a finite number")


def require_count(name: str, value: Any) -> None:
    """A whole number of at least 1."""
    if isinstance(value, str):
        number = _as_number(value)
        _refuse_text(name, value, "a whole number of at least 1", number if _is_count(number) else None)
    if not _is_count(value) or isinstance(value, float):
        raise UserError(f"{flag_of(name)} is {value!r}; it must be a whole number of at least 1")


def require_text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise UserError(f"{flag_of(name)} is {value!r}; it must be a text")


def read_setting(action: argparse.Action, value: Any) -> Any:
    """A setting of ours from a namespace, of the type that its flag gives it; ranges are not checked here.

    Args:
        action: the flag's argparse action.
        value: from the flag, from a YAML file, or None where neither sets it.

    Raises:
        UserError: names the flag and how to write the value.
    """
    name = action.dest
    if value is None:
        return None
    if action.nargs == 0:
        return read_boolean(name, value)
    if action.choices is not None:
        if not isinstance(value, str) or value not in action.choices:
            choices = ", ".join(map(str, action.choices))
            raise UserError(f"{flag_of(name)} is {value!r}; it must be one of {choices}")
        return value
    if action.type in (None, str):
        require_text(name, value)
        return value
    if isinstance(value, str):
        return _read_text(action, value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise UserError(f"{flag_of(name)} is {value!r}; it must be a single number")
    return value


def _read_text(action: argparse.Action, text: str) -> str:
    """The word ``none`` where the flag takes it; a number written as text is refused."""
    number = _as_number(text)
    try:
        if action.type(text if number is None else str(number)) == "none":
            return "none"
    except (ValueError, argparse.ArgumentTypeError):
        number = None
    wanted = getattr(action.type, "__name__", "number").replace("float", "a number").replace("int", "an integer")
    _refuse_text(action.dest, text, wanted, number)


def _refuse_text(name: str, text: str, wanted: str, number: float | None) -> None:
    if number is None or not math.isfinite(number):
        raise UserError(f"{flag_of(name)} is the text {text!r}; it must be {wanted}")
    raise UserError(f"{flag_of(name)} is the text {text!r}, not a number; write {name}: {number!r}")


def _as_number(text: str) -> float | None:
    """The number that a text shows, whole where it is whole; None if it shows none."""
    try:
        number = float(text)
    except ValueError:
        return None
    return int(number) if number.is_integer() and "." not in text else number


def _is_count(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and value >= 1
