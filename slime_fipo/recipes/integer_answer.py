r"""Reads the integer that a label, or the end of a response, spells: ``034``, ``**34**``, ``\boxed{1{,}000}``, ``−5``.

The reward and ``slime-fipo check`` share these functions, so both judge a label alike. Integers are compared as strings
of digits, which have no largest value; every pattern is linear in its input. math-verify was tried first: it needs
SymPy and ANTLR, which slime's image does not have, refuses to run in slime's event-loop thread, and reads ``34 or 35``
and ``not 34`` as 34, ``1{,}000`` as 1, and no Unicode minus.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal

TAIL = 300  # characters of a response that slime's DAPO verifier reads
FLOAT_EXACT = 2**53

_SPELLINGS = {
    **dict.fromkeys(map(ord, "−–－﹣‒"), "-"),
    **dict.fromkeys(map(ord, "\u00a0\u2007\u2009\u202f"), " "),
    **{ord("０") + digit: str(digit) for digit in range(10)},
    **{ord("＋"): "+", ord("＝"): "=", ord("．"): ".", ord("。"): ".", ord("，"): ",", ord("＄"): "$", ord("％"): "%"},
}
# Each alternative starts differently from the others, so there is one way to match a text and no backtracking.
_WRAPPING = (
    r"[\s*_`\"“”${}()]|\\[()\[\],;:! $]|\\(?:boxed|fbox|text|textbf|textit|mathrm|mathbf|bm)\s*\{|\\q?quad(?![A-Za-z])"
)
_UNIT = (
    r"\\?%|°|\^\\circ(?![A-Za-z])|\^\{\\circ\}|\\degree(?![A-Za-z])"
    r"|(?:degree|meter|mile|hour|minute|second|day|dollar|cent|unit|point)s?(?![a-z])"
    r"|(?:percent|inch|inches|foot|feet|mm|cm|km)(?![a-z])"
)
_PREFIX = re.compile(rf"(?:[+-]|{_WRAPPING})*")
_SUFFIX = re.compile(rf"(?:[.,;]|<\|[a-z_]+\|>|{_UNIT}|{_WRAPPING})*")
_CIRCLE = re.compile(r"\^\{\\circ\}")
_DIGITS = re.compile(r"[0-9]+(?:(,|\{,\}|\\,|,\\!| )[0-9]{3}(?:\1[0-9]{3})*)?(?:\.0+)?")
_COMMAND = r"\\(?!(?:ne|neq|not|le|leq|ge|geq|lt|gt|approx|sim|equiv)(?![A-Za-z]))[A-Za-z]+(?![A-Za-z])"
_VARIABLE = re.compile(rf"(?:[\s*_`$~{{}}()+\-/^|,']|{_COMMAND}|\\[^A-Za-z]|(?:[A-Z]+|[a-z])(?![A-Za-z]))*")
_ANSWER = re.compile(r"answer[\s*_]*[:：][\s*_$]*(?:\\[\[(]\s*)?([^\n]+)", re.IGNORECASE)
_BRACE = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)


def read_integer(text: str) -> str | None:
    r"""The integer that ``text`` spells and nothing else, in canonical digits (``-5``, ``0``, ``1000``).

    Accepts leading zeros and a zero fraction, thousands separators, Unicode and full-width signs and digits, Markdown
    and LaTeX wrapping, a variable before ``=``, a unit, a percent or degree sign, and a final period.

    Returns:
        None where anything else is said: two numbers, a fraction, an expression, words.
    """
    variable, _, text = text.translate(_SPELLINGS).rpartition("=")
    first = re.search("[0-9]", text)
    if first is None or not _VARIABLE.fullmatch(variable):
        return None
    end = len(text) - re.search("[0-9]", text[::-1]).start()
    prefix, number, suffix = text[: first.start()], text[first.start() : end], text[end:]
    if not (_PREFIX.fullmatch(prefix) and _SUFFIX.fullmatch(suffix)):
        return None
    signs = re.findall("[+-]", prefix)
    number = _DIGITS.fullmatch(number)
    if number is None or (number[1] and not re.match("[0-9]{1,3}(?![0-9])", number[0])) or len(signs) > 1:
        return None
    depth = 0
    for brace in re.findall("[{}]", variable + prefix + _CIRCLE.sub("", suffix)):
        depth += 1 if brace == "{" else -1
        if depth < 0:
            return None
    if depth:
        return None
    digits = re.sub("[^0-9]", "", number[0].partition(".")[0]).lstrip("0") or "0"
    return f"-{digits}" if "-" in signs and digits != "0" else digits


def label_integer(label) -> str:
    """Canonical digits of a label as data files hold it: text, an integer, or a float without a fraction.

    Raises:
        ValueError: it is no integer, or a float from 2^53 on, which may have been rounded. The message shows it.
    """
    integer = None
    if isinstance(label, float):
        if label.is_integer() and abs(label) < FLOAT_EXACT:
            integer = str(int(label))
    elif isinstance(label, str | int | Decimal) and not isinstance(label, bool):
        try:
            integer = read_integer(str(label))
        except ValueError:  # Python writes no int of more than 4,300 digits
            integer = None
    if integer is None:
        raise ValueError(f"the label {shown(label)} is not an integer")
    return integer


def shown(label) -> str:
    """``repr`` for a message, shortened: a label may be a page of text, or an int that is too long to write."""
    try:
        shown = repr(label)
    except ValueError:
        return f"of {label.bit_length()} bits"
    return shown if len(shown) <= 80 else f"{shown[:80]}…"


def final_integer(response: str, box_counts: bool, longest: int = TAIL) -> str | None:
    r"""The integer that the last ``longest`` characters of a response end with.

    That is what stands behind the last ``Answer:``. Where no integer stands there and ``box_counts``, it is the last
    ``\boxed{…}`` from there on; boxes of different content on its line, or a box that is not closed, are no answer.
    """
    tail = response[-longest:]
    marks = list(_ANSWER.finditer(tail))
    if marks:
        integer = read_integer(marks[-1][1])
        if integer is not None:
            return integer
        tail = tail[marks[-1].start() :]
    return _boxed_integer(tail) if box_counts else None


def _boxed_integer(text: str) -> str | None:
    boxes: list[tuple[int, int]] = []  # where the contents of the outermost boxes start and end
    opened: list[int] = []  # per open brace the start of its box's content; 0 for a brace of another kind
    depth = 0  # open boxes
    for token in _BRACE.finditer(text):
        if token[0] == "{":
            opened.append(0)
        elif token[0].startswith("\\boxed"):
            opened.append(token.end())
            depth += 1
        elif token[0] == "}" and opened:
            start = opened.pop()
            depth -= start > 0
            if start and not depth:
                boxes.append((start, token.start()))
    if not boxes or depth:
        return None
    line = text.rfind("\n", 0, boxes[-1][0]) + 1
    found = {read_integer(text[start:end]) for start, end in boxes if start > line}
    return found.pop() if len(found) == 1 else None


def asks_for_box(prompt: str | list) -> bool:
    r"""Whether a prompt, as text or as chat messages, asks for the answer in ``\boxed{}``."""
    return any("\\boxed" in text or "boxed{" in text for text in _texts(prompt))


def _texts(prompt) -> Iterator[str]:
    if isinstance(prompt, str):
        yield prompt
    elif isinstance(prompt, dict):
        yield from _texts(prompt.get("content") or prompt.get("text"))
    elif isinstance(prompt, list | tuple):
        for part in prompt:
            yield from _texts(part)
