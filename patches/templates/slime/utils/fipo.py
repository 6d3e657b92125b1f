"""FIPO, Future-KL Influenced Policy Optimization (arXiv:2603.19835): settings, flags and per-token weights.

The clipped, dual-clipped PPO term is positively homogeneous in the advantage, so FIPO is one non-negative weight per
token that ``policy_loss_function`` multiplies onto its loss, where it also multiplies OPSM's mask. This module knows
torch and the parsed namespace; how a micro-batch is laid out is in ``slime/backends/megatron_utils/fipo.py``.

Tensors are packed: the tokens of all responses of a micro-batch end to end, beside a list of response lengths.
"""

from __future__ import annotations

import argparse
import logging
import math
import numbers
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.distributed as dist
from torch import Tensor

logger = logging.getLogger(__name__)

#: algorithm.config DECAY_OVER
#: algorithm.config UNCLIPPED_BOUNDS
#: algorithm.config SAFETY_BOUNDS
#: algorithm.weights MAX_SHIFT
#: algorithm.weights METRICS

#: algorithm.config FipoConfig

#: algorithm.config PRESETS

# ---------------------------------------------------------------------------- flags

#: algorithm.arguments _DEFAULTS

#: algorithm.arguments _or_none

#: algorithm.arguments _FIELD_FLAGS

#: algorithm.arguments _dest

#: algorithm.arguments add_fipo_arguments

#: algorithm.arguments fipo_config_from_args

#: algorithm.arguments _flag_of

#: plugin.arguments shift_is_apart


def validate_fipo_args(args: argparse.Namespace) -> None:
    """Check FIPO's settings and what they need of other flags, and write the effective settings back into ``args``.

    Also sets ``args.eps_clip_c``, so that the policy loss clips at the same constant c.

    Raises:
        ValueError: names the flag, what it got, and what to do instead.
    """
    if args.loss_type != "fipo_loss":
        given = [name for name, value in vars(args).items() if name.startswith("fipo_") and value is not None]
        if given:
            flag = given[0].replace("_", "-")
            raise ValueError(f"--{flag} needs --loss-type fipo_loss; it is {args.loss_type}")
        return

    config = fipo_config_from_args(args)
    c = config.dual_clip_c
    if args.eps_clip_c is not None and args.eps_clip_c != c:
        raise ValueError(
            f"--eps-clip-c {args.eps_clip_c} contradicts --fipo-dual-clip-c {'none' if c is None else f'{c:g}'}, which"
            " also sets the dual clip; drop --eps-clip-c"
        )
    if args.advantage_estimator in ("gspo", "cispo"):
        raise ValueError(
            f"--advantage-estimator {args.advantage_estimator} has no per-token PPO ratio for FIPO to weight; use grpo,"
            " reinforce_plus_plus, reinforce_plus_plus_baseline or ppo, or drop --loss-type fipo_loss"
        )
    if not args.compute_advantages_and_returns:
        raise ValueError("--disable-compute-advantages-and-returns leaves FIPO no advantages to weight; drop it")
    if shift_is_apart(args) and not args.get_mismatch_metrics:
        raise ValueError(
            "--fipo-shift-from train beside --use-rollout-logprobs needs Megatron's log-probs, which are recomputed"
            " then with --get-mismatch-metrics and --custom-tis-function-path; add both"
        )
    _check_steps_per_rollout(args)

    args.eps_clip_c = c
    for flag, (field, _) in _FIELD_FLAGS.items():
        value = getattr(config, field)
        setattr(args, _dest(flag), "none" if value is None else value)
    args.fipo_unclipped = not config.clip_influence
    args.fipo_clip_ratio = None
    args.fipo_shift_from = args.fipo_shift_from or "ratio"
    args.fipo_allow_single_step = bool(args.fipo_allow_single_step)
    args.fipo_log_detail = bool(args.fipo_log_detail)
    if args.fipo_unclipped:
        args.fipo_clip_ratio_low = args.fipo_clip_ratio_high = args.fipo_clip_high_only = None
    logger.info("FIPO: %s", config)


#: plugin.arguments _check_steps_per_rollout


# ---------------------------------------------------------------------------- packed tensors

#: algorithm.packed to_device

#: algorithm.packed last_tokens

#: algorithm.packed per_response_sum

#: algorithm.packed per_token


# ---------------------------------------------------------------------------- Future-KL
#
# F_t = x_t + γ^{d_t} F_{t+1} by odd-even reduction: neighbouring tokens are merged in pairs, the half as long
# recurrence of the pairs is solved the same way, and every second token is filled in from its right neighbour. Linear
# in the tokens, no padding, no loop over them, and the rounding error of a tree sum. The decay over a span is always
# taken from its distance, exp2(-d/τ), so it neither drifts at large τ nor overflows at small τ.

#: algorithm.scan scan_future_kl

#: algorithm.scan log2_decay_of

#: algorithm.scan solve_recurrence

#: algorithm.context_parallel ContextParallel


# ---------------------------------------------------------------------------- weights

#: algorithm.weights FipoWeights


@torch.no_grad()
def fipo_weights(
    log_ratio: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    lengths: list[int],
    config: FipoConfig,
    *,
    cp: ContextParallel | None = None,
    metrics: Collection[str] = METRICS,
) -> FipoWeights:
    """Influence weights of a packed micro-batch (Eq. 3-7 and Sec. 3.2).

    Args:
        log_ratio: log π_θ(y_t) − log π_old(y_t) [T]; any floating dtype, computed in at least float32.
        advantages: A_t [T].
        loss_mask: [T], non-zero where a token is trained (any dtype).
        lengths: response lengths, B integers that add up to T; masked tokens inside a response count.
        config: the settings.
        cp: with context parallelism, how the responses are spread; all tensors and ``lengths`` then are this rank's.
            Calls one collective on ``cp.group``, also on a rank without tokens.
        metrics: which of ``METRICS`` to compute.

    Non-finite log-ratios take no part in Future-KL and leave other tokens' weights alone.
    """
    counts = torch.tensor(lengths, dtype=torch.int64)
    chunks = torch.tensor(cp.chunk_lengths, dtype=torch.int64) if cp is not None else None
    dtype = torch.promote_types(log_ratio.dtype, torch.float32)
    #: algorithm.weights fipo_weights from trained
