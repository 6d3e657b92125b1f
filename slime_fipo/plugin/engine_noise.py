"""A run whose weights follow the engines' disagreement is told so, once: what ``fipo/mismatch_clip_frac`` means.

The loss adds up the share at a rollout's first step, on the rank that logs slime's training metrics; the share of that
rank's responses is read before the next step, where slime has waited for the device anyway. Nothing is gathered.
"""

from __future__ import annotations

import logging
from argparse import Namespace

import torch
from torch import Tensor

from .arguments import fipo_settings

WORRYING_SHARE = 0.05

logger = logging.getLogger(__name__)


class EngineNoise:
    """The share of weights that the clip moved before the policy did, and when to warn of it."""

    def __init__(self) -> None:
        self._sums: tuple[Tensor, Tensor] | None = None
        self._warned_of = WORRYING_SHARE / 2  # so that the first warning comes at the worrying share

    def add(self, clipped: Tensor, weights: Tensor) -> None:
        """Add a micro-batch's reduced clip share, and its reduced ones: their ratio is the share. Both are scalars."""
        if self._sums is not None:
            clipped, weights = clipped + self._sums[0], weights + self._sums[1]
        self._sums = clipped.detach(), weights.detach()

    def report(self, args: Namespace) -> None:
        """Warn if the last first step's share is worrying, and at least twice what was warned of before."""
        if self._sums is None:
            return
        clipped, weights = torch.stack(self._sums).tolist()
        self._sums = None
        share = clipped / weights if weights else 0.0
        if share <= WORRYING_SHARE or share < 2 * self._warned_of:
            return
        self._warned_of = share
        logger.warning(
            "FIPO: at this rollout's first step, before the trainer moved, %.0f%% of the weights are clipped"
            " (fipo/mismatch_clip_frac). The shift there is what SGLang's and Megatron's log-probs differ by"
            " (train_async.py: and one weight update), so the weights follow engine noise. Ways out: --fipo-shift-from"
            " train; LOGPROBS=train in slime-fipo's launch scripts; a smaller half-life than --fipo-decay-rate %g; a"
            " vocabulary that Megatron does not pad (--make-vocab-size-divisible-by%s)",
            100 * share,
            fipo_settings(args).decay_rate,
            _padding(args),
        )


def _padding(args: Namespace) -> str:
    vocabulary, padded = getattr(args, "vocab_size", None), getattr(args, "padded_vocab_size", None)
    if not vocabulary or not padded:
        return ""
    return f": it pads {vocabulary} to {padded} now" if padded > vocabulary else ": it pads nothing now"
