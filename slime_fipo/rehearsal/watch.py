"""What the user's code does in a rehearsal, written down in the processes of slime that call it.

``site/`` calls :func:`count_hooks` and :func:`plant_answers` when slime's modules have been loaded, where
``SLIME_FIPO_WATCH`` names a folder. Each process appends to a file of its own there, one JSON object a line;
``verdict.py`` reads them.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = "SLIME_FIPO_WATCH"
MOST_DROPS = 24  # groups in a row that a filter may drop; with half of the answers right none drops that many


def record(kind: str, **what: Any) -> None:
    """Append an event to this process's file."""
    folder = os.environ.get(FOLDER)
    if folder:
        with open(os.path.join(folder, f"{os.getpid()}.jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, **what}, default=repr) + "\n")


def events(folder: Path) -> Iterator[dict[str, Any]]:
    """All events of all processes; those of one process in their order."""
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            yield json.loads(line)


def count_hooks(misc: ModuleType) -> None:
    """Have ``slime.utils.misc.load_function`` count the calls of what it loads, and say what they raise."""
    load = misc.load_function

    @functools.cache
    @functools.wraps(load)  # SGLang's processes get it pickled, by its name
    def load_function(path: str):
        try:
            function = load(path)
        except Exception as error:
            record("hook", path=path, error=described(error))
            raise
        record("loaded", path=path)
        return function if isinstance(function, type) else _counted(path, function)

    misc.load_function = load_function


def _counted(path: str, function):
    drops = 0

    def note(args: tuple, result):
        nonlocal drops
        record("hook", path=path)
        if _is_filter(path, args):
            keep = bool(getattr(result, "keep", result))  # slime takes what has no ``keep`` for the answer itself
            returned = ""
            if not hasattr(result, "keep") and not isinstance(result, bool):
                returned = "nothing" if result is None else f"a {type(result).__name__}"
            record("filter", path=path, keep=keep, rewards=_rewards(*args[:2]), returned=returned)
            drops = 0 if keep else drops + 1
            if drops == MOST_DROPS:
                stuck = f"dropped {drops} groups in a row, so that a rollout never fills up"
                record("stuck", path=path, error=stuck)
                raise RuntimeError(f"{path} {stuck}")
        return result

    @functools.wraps(function)
    def counted(*args, **kwargs):
        with _errors_recorded(path):
            result = function(*args, **kwargs)
        if inspect.isawaitable(result) and not _is_filter(path, args):  # slime awaits no filter
            return _awaited(args, result)
        return note(args, result)

    async def _awaited(args, result):
        with _errors_recorded(path):
            result = await result
        return note(args, result)

    return counted


def _is_filter(path: str, args: tuple) -> bool:
    return len(args) > 1 and getattr(args[0], "dynamic_sampling_filter_path", None) == path


class _errors_recorded:
    def __init__(self, path: str) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, Exception):
            record("hook", path=self.path, error=described(error))


def described(error: Exception) -> str:
    """An error in one line, with the place in the user's code."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


def _rewards(args, group) -> list[float]:
    """What the filter judged: ``acc`` of reward dictionaries that have it, else slime's reward value."""
    samples = [sample for one in group for sample in (one if isinstance(one, list) else [one])]
    return [reward_value(args, sample.reward) for sample in samples]


def reward_value(args, reward: Any) -> float:
    """A reward as a number: ``acc`` where the reward has it, since shaping hides it in the rest; NaN for none."""
    if isinstance(reward, dict):
        reward = reward.get("acc", reward.get(args.reward_key))
    try:
        return float(reward)
    except (TypeError, ValueError):
        return float("nan")
