"""DAPO's math reward with the soft overlong penalty, for slime's ``--custom-rm-path``.

Score and accuracy are returned apart: train on ``--reward-key score``, and let everything that asks «was it right»
(group filter, evaluation, pass rates) read ``acc``. The verifier is slime's own, with a second look at usual spellings
of the right integer; how those are read is in ``integer_answer.py``.
"""

from __future__ import annotations

import asyncio
from argparse import Namespace
from collections.abc import Callable
from typing import NamedTuple

from .integer_answer import TAIL, asks_for_box, final_integer, label_integer, read_integer

NO_ANSWER = "[INVALID]"  # what slime's DAPO verifier says where it finds none
FLOAT_EXACT_DIGITS = 15  # slime's verifier reads labels as floats, which hold every integer of so many digits


def soft_overlong_penalty(response_length: int, max_length: int, buffer_length: int, factor: float = 1.0) -> float:
    """Soft overlong punishment (DAPO, arXiv:2503.14476, Eq. 13), times ``factor``.

    Args:
        response_length: n, tokens of the response.
        max_length: M, tokens at which the penalty is full.
        buffer_length: C, tokens below M over which the penalty grows linearly; 0 turns the penalty off.
        factor: size of the full penalty.

    Returns:
        0 for n ≤ M − C; factor · (M − C − n) / C up to M; −factor beyond.

    Raises:
        ValueError: C is negative or above M, or the factor is negative.
    """
    if not 0 <= buffer_length <= max_length:
        raise ValueError(
            f"--overlong-buffer-len is {buffer_length}; it must lie in 0 … --rollout-max-response-len {max_length}"
        )
    if factor < 0:
        raise ValueError(f"--overlong-penalty-factor is {factor:g}; it must be at least 0 (it is subtracted)")
    if buffer_length == 0:
        return 0.0
    excess = response_length - (max_length - buffer_length)
    return -factor * min(max(excess / buffer_length, 0.0), 1.0)


class Verdict(NamedTuple):
    """``correct``; ``answer`` in canonical digits where it is an integer, else as the verifier read it; and whether the
    second look alone found it right, and whether no integer was found."""

    correct: bool
    answer: str
    second_look: bool
    unread: bool


def verify(response: str, label, prompt: str | list, verifier: Callable[[str, str], dict]) -> Verdict:
    r"""slime's DAPO verdict, and ours where it finds no answer or only the spelling of the integer differs.

    Whatever ``verifier`` calls right is right, and an integer other than the label that it read stays wrong. A label
    of more than 15 digits, which it would round, is compared by :func:`final_integer` alone.

    Args:
        prompt: an answer in ``\boxed{}`` without ``Answer:`` counts where the prompt asks for it.
        verifier: slime's ``compute_score``, or one like it: takes response and label, returns ``acc`` and ``pred``.

    Raises:
        ValueError: the label is no integer.
    """
    label = label_integer(label)
    first, second_look = NO_ANSWER, len(label) <= FLOAT_EXACT_DIGITS
    if second_look:
        score = verifier(response, label)
        if score["acc"]:
            return Verdict(True, label, second_look=False, unread=False)
        first = score["pred"]
    found = final_integer(response, asks_for_box(prompt), longest=max(TAIL, 2 * len(label)))
    # slime has taken words and the left side of equations out of ``pred``: it may speak against an answer, not for one.
    read = read_integer(first)
    integer = found if read in (None, label) else read
    correct = integer == label
    return Verdict(correct, integer or first, second_look and correct, unread=integer is None)


async def dapo_math_reward(args: Namespace, sample, **kwargs):
    """Score one sample, or each of a list of samples (slime's ``--group-rm`` and fan-out rollouts pass lists).

    Args:
        args: slime's namespace; reads ``rollout_max_response_len``, ``overlong_buffer_len`` (missing: no penalty) and
            ``overlong_penalty_factor``.
        sample: a ``slime.utils.types.Sample`` with ``prompt``, ``response``, ``response_length`` and an integer
            ``label``.

    Returns:
        A dictionary: ``score`` (±1 plus the penalty), ``acc`` (1.0 right, 0.0 wrong), ``pred`` (the answer that was
        read, canonical where it is an integer, or ``[INVALID]``), ``overlong_penalty`` (≤ 0), and, as 0.0 or 1.0,
        ``second_look`` (right, though slime's verifier did not see it) and ``unread`` (no integer was found).
        ``sample.metadata["raw_reward"]`` becomes ``acc``, so that slime's ``--log-passrate``, which counts rewards
        equal to 1, still counts right answers.

    Raises:
        ValueError: the label is no integer. ``slime-fipo check`` reads every label by the same function beforehand.
    """
    if isinstance(sample, list):
        return await asyncio.gather(*(dapo_math_reward(args, one, **kwargs) for one in sample))

    from slime.rollout.rm_hub.math_dapo_utils import compute_score

    try:
        verdict = verify(sample.response, sample.label, sample.prompt, compute_score)
    except ValueError as error:
        raise ValueError(
            f"{error} (sample {sample.index}); point --label-key at integer answers or use another --custom-rm-path"
        ) from None

    buffer_length = getattr(args, "overlong_buffer_len", None) or 0
    penalty = soft_overlong_penalty(
        sample.response_length,
        args.rollout_max_response_len if buffer_length else 0,
        buffer_length,
        getattr(args, "overlong_penalty_factor", 1.0),
    )
    accuracy = float(verdict.correct)
    sample.metadata = {**(sample.metadata or {}), "raw_reward": accuracy}
    return {
        "score": (1.0 if verdict.correct else -1.0) + penalty,
        "acc": accuracy,
        "pred": verdict.answer,
        "overlong_penalty": penalty,
        "second_look": float(verdict.second_look),
        "unread": float(verdict.unread),
    }
