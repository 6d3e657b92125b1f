"""DAPO's math reward with the soft overlong penalty, for slime's ``--custom-rm-path``.

Score and accuracy are returned apart: train on ``--reward-key score``, and let everything that asks «was it right»
(group filter, evaluation, pass rates) read ``acc``. The verifier is slime's own.
"""

from __future__ import annotations

import asyncio
from argparse import Namespace


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


async def dapo_math_reward(args: Namespace, sample, **kwargs):
    """Score one sample, or each of a list of samples (slime's ``--group-rm`` and fan-out rollouts pass lists).

    Args:
        args: slime's namespace; reads ``rollout_max_response_len``, ``overlong_buffer_len`` (missing: no penalty) and
            ``overlong_penalty_factor``.
        sample: a ``slime.utils.types.Sample`` with ``response``, ``response_length`` and an integer ``label``.

    Returns:
        A dictionary: ``score`` (±1 plus the penalty), ``acc`` (1.0 right, 0.0 wrong), ``pred`` (the answer that the
        verifier read, or ``[INVALID]``) and ``overlong_penalty`` (≤ 0). ``sample.metadata["raw_reward"]`` becomes
        ``acc``, so that slime's ``--log-passrate``, which counts rewards equal to 1, still counts right answers.

    Raises:
        ValueError: the label is no integer, so DAPO's verifier cannot compare it.
    """
    if isinstance(sample, list):
        return await asyncio.gather(*(dapo_math_reward(args, one, **kwargs) for one in sample))

    from slime.rollout.rm_hub.math_dapo_utils import compute_score

    try:
        verdict = compute_score(sample.response, sample.label)
    except (ValueError, TypeError, OverflowError):
        raise ValueError(
            f"the label {sample.label!r} of sample {sample.index} is no integer, which DAPO's verifier compares;"
            " point --label-key at integer answers or use another --custom-rm-path"
        ) from None

    buffer_length = getattr(args, "overlong_buffer_len", None) or 0
    penalty = soft_overlong_penalty(
        sample.response_length,
        args.rollout_max_response_len if buffer_length else 0,
        buffer_length,
        getattr(args, "overlong_penalty_factor", 1.0),
    )
    accuracy = float(verdict["acc"])
    sample.metadata = {**(sample.metadata or {}), "raw_reward": accuracy}
    return {
        "score": verdict["score"] + penalty,
        "acc": accuracy,
        "pred": verdict["pred"],
        "overlong_penalty": penalty,
    }
