"""The YAML files whose values slime puts over its flags: ``--custom-config-path``, and a role's overrides in
``--megatron-config-path``. They are read as slime reads them, with errors of one line; what FIPO makes of the values is
in ``arguments.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError

ROLE_CONFIG = "--megatron-config-path"
_EXAMPLE = "megatron: [{name: default, role: actor, overrides: {…}}]"
_NOT_OVERRIDDEN = ("num_nodes", "num_gpus_per_node")  # slime takes these from its flags alone


def read_mapping(flag: str, path: str) -> dict[str, Any]:
    """A YAML file's mapping; empty files are empty mappings.

    Args:
        flag: the flag that names the file, for the message.

    Raises:
        UserError: the file cannot be read or holds something else.
    """
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be read ({error.strerror}); check the path") from None
    except (yaml.YAMLError, ValueError) as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        where = "" if line is None else f" in line {line + 1}"
        raise UserError(f"{flag} {path} is not valid YAML; fix the syntax{where}") from None
    if data is None:
        return {}
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise UserError(f"{flag} {path} holds no mapping of names to values; write one 'name: value' per line")
    return data


def role_overrides(path: str) -> dict[str, dict[str, Any]]:
    """Role -> the values that ``--megatron-config-path`` puts over the flags for it.

    Raises:
        UserError: the file cannot be read, or slime would stop at it once it has taken the GPUs.
    """
    entries = read_mapping(ROLE_CONFIG, path).get("megatron")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{ROLE_CONFIG} {path} has no list of roles; write {_EXAMPLE}")
    overrides: dict[str, dict[str, Any]] = {}
    for entry in entries:
        role = entry.get("role")
        if role not in ("actor", "critic"):
            raise UserError(f"{ROLE_CONFIG} {path} has an entry with role {role!r}; use actor or critic")
        if role in overrides:
            raise UserError(f"{ROLE_CONFIG} {path} has two entries with role {role}; merge them into one")
        values = entry.get("overrides") or entry.get("args") or {}
        if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
            raise UserError(f"{ROLE_CONFIG} {path} has overrides for {role} that are not a mapping; write {_EXAMPLE}")
        overrides[role] = values
    return overrides


def with_overrides(args: argparse.Namespace, overrides: dict[str, Any]) -> argparse.Namespace:
    """A copy of ``args`` with a role's values put over it as slime does: a text takes the type of the number below it.

    Raises:
        UserError: a text where a boolean is; slime takes every text for true.
    """
    args = copy.copy(args)
    for name, value in overrides.items():
        if name in _NOT_OVERRIDDEN:
            continue
        below = getattr(args, name, None)
        if isinstance(value, str) and isinstance(below, bool):
            raise UserError(
                f"{name} is the text {value!r}, which slime takes for true; write {name}: true or {name}: false"
            )
        if isinstance(value, str) and isinstance(below, int | float):
            with contextlib.suppress(ValueError):  # slime leaves the text as it is
                value = type(below)(value)
        setattr(args, name, value)
    return args
