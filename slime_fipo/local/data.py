"""Reading JSONL data over a declared alphabet: prompts with labels, and demonstrations with responses.

One character is one token. Files are checked in full before a run starts, so that a bad line is an error with file
and line number and never a crash in the middle of training.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np

from ..errors import UserError

END = 0  # the end-of-response token; characters follow from 1


class Alphabet:
    """One token per character, and ``END``."""

    def __init__(self, characters: str):
        if not characters or len(set(characters)) != len(characters):
            raise UserError(f"--alphabet is {characters!r}; it must be one or more characters, each once")
        self.characters = characters
        self._ids = {c: i for i, c in enumerate(characters, start=1)}

    @property
    def size(self) -> int:
        return len(self.characters) + 1

    def encode(self, text: str) -> list[int]:
        return [self._ids[c] for c in text]

    def decode(self, tokens: list[int]) -> str:
        """The text, without ``END``."""
        return "".join(self.characters[t - 1] for t in tokens if t != END)

    def first_unknown(self, text: str) -> str | None:
        return next((c for c in text if c not in self._ids), None)


@dataclass(frozen=True)
class Record:
    """One line: what goes in, and what should come out (a label, or a demonstration's response)."""

    prompt: str
    target: str


def read_jsonl(flag: str, path: str, input_key: str, target_key: str, alphabet: Alphabet) -> list[Record]:
    """All records of a JSONL file. Blank lines are skipped; numbers as values are taken as their text.

    Raises:
        UserError: the file cannot be read, holds no record, or a line is malformed (file and line are named).
    """
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.readlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise UserError(f"{flag} {path}: {reason}") from None
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{flag} {path}, line {number}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{place}: not valid JSON ({error.msg} at column {error.colno})") from None
        except (ValueError, RecursionError):
            raise UserError(f"{place}: a number too long or brackets too deep for Python's JSON") from None
        if not isinstance(entry, dict):
            raise UserError(
                f"{place}: a {type(entry).__name__}; it must be an object with {input_key!r}, {target_key!r}"
            )
        prompt, target = (_text(entry, key, place) for key in (input_key, target_key))
        if not prompt:
            raise UserError(f"{place}: {input_key!r} is empty; a prompt needs at least one character")
        for key, text in ((input_key, prompt), (target_key, target)):
            unknown = alphabet.first_unknown(text)
            if unknown is not None:
                raise UserError(
                    f"{place}: {key!r} holds {unknown!r}, which is not in --alphabet {alphabet.characters!r}"
                )
        records.append(Record(prompt, target))
    if not records:
        raise UserError(f"{flag} {path}: no records; it must hold at least one line")
    return records


def _text(entry: dict, key: str, place: str) -> str:
    if key not in entry:
        raise UserError(f"{place}: no {key!r}; its keys are {', '.join(map(repr, entry)) or 'none'}")
    value = entry[key]
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise UserError(f"{place}: {key!r} is a {type(value).__name__}; it must be a string or a number")
    return str(value)


class PromptSource:
    """Endless walk over the prompts: epoch after epoch, each in file order or shuffled by its own seed.

    ``position`` counts prompts handed out since the start; it is all that a checkpoint needs to keep.
    """

    def __init__(self, records: list[Record], shuffle: bool, seed: int, position: int = 0):
        self.records, self.shuffle, self.seed, self.position = records, shuffle, seed, position

    def take(self, count: int) -> list[Record]:
        taken = []
        while len(taken) < count:
            epoch, offset = divmod(self.position, len(self.records))
            order = self._order(epoch)[offset : offset + count - len(taken)]
            taken += [self.records[i] for i in order]
            self.position += len(order)
        return taken

    def _order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(len(self.records))
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.records))
