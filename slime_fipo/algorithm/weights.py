"""FIPO's influence weights (Eq. 3-7 and Sec. 3.2): one non-negative number per token.

The clipped, dual-clipped PPO term is positively homogeneous in the advantage, so FIPO is this weight multiplied
onto a host's own per-token policy loss. The loss itself is the host's, or ``policy_loss.py`` for callers without one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import SAFETY_BOUNDS, FipoConfig
from .context_parallel import ContextParallel
from .future_kl import compute_dtype, compute_future_kl
from .kernel_check import kernel_agrees, load_kernel, moved
from .packed import check_lengths, check_tokens, per_response_sum, per_token

MAX_SHIFT = 20.0  # Eq. 3: log-ratios beyond ±20 nats are clamped

METRICS = (
    "future_kl",
    "influence_weight",
    "influence_deviation",
    "clip_high_frac",
    "clip_low_frac",
    "safety_capped_frac",
    "excluded_frac",
    "dropped_frac",
    "nonfinite_frac",
    "neg_ratio_2_3",
    "neg_ratio_3_4",
    "neg_ratio_4_c",
)


@dataclass(frozen=True, eq=False)
class FipoWeights:
    """What ``fipo_weights`` returns. All tensors are detached, in float32 (float64 for float64 log-probs, unless by
    ``impl="triton"``), and share no memory. ``==`` is identity.

    Attributes:
        weights: w [T] = f_t · keep_i, to multiply onto the per-token policy loss; 0 on tokens of dropped responses.
        future_kl: F [T] in nats (Eq. 6).
        keep: bool [B]; False where the sequence filter dropped the response.
        metrics: name -> [T] per-token values (0 or 1 for shares), to be averaged with the host's own masks:

            - ``future_kl``: F_t
            - ``influence_weight``: f_t, after clip and safety cap
            - ``influence_deviation``: |f_t − 1|
            - ``clip_high_frac``, ``clip_low_frac``: f_t was brought to the upper, lower bound; as the authors count,
              after the safety cap
            - ``safety_capped_frac``: A_t < 0 and ratio > s
            - ``excluded_frac``: ratio > c, does not take part in Future-KL
            - ``dropped_frac``: in a response that the sequence filter dropped
            - ``nonfinite_frac``: the log-ratio is NaN or infinite
            - ``neg_ratio_2_3``, ``neg_ratio_3_4``, ``neg_ratio_4_c``: A_t < 0 and ratio in [2, 3), [3, 4), [4, c)
    """

    weights: Tensor
    future_kl: Tensor
    keep: Tensor
    metrics: dict[str, Tensor]


@torch._disable_dynamo  # torch.compiler.disable, whose import of the compiler takes seconds, put off to the first call
@torch.no_grad()
def fipo_weights(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    lengths,
    config: FipoConfig,
    *,
    cp: ContextParallel | None = None,
    metrics: Iterable[str] = METRICS,
) -> FipoWeights:
    """Influence weights of a packed batch (arXiv:2603.19835, Eq. 3-7 and Sec. 3.2).

    Args:
        log_probs: log π_θ(y_t) [T] of the current policy; any floating dtype.
        old_log_probs: log π_old(y_t) [T].
        advantages: A_t [T].
        loss_mask: [T], non-zero where a token is trained (any dtype).
        lengths: response lengths, B integers ≥ 0 that add up to T; masked tokens inside a response count.
        config: the settings.
        cp: with context parallelism, how the responses are spread; all tensors and ``lengths`` then are this rank's.
            Calls one collective on ``cp.group``, also on a rank without tokens and on one that raises.
        metrics: which of ``METRICS`` to compute; a host that logs a few pays for those.

    Returns:
        :class:`FipoWeights`. Non-finite log-ratios take no part in Future-KL and leave other tokens' weights alone.

    Raises:
        ValueError: an argument has the wrong type, shape or device; the message names it.
        RuntimeError: another rank of ``cp.group`` raised; see :meth:`ContextParallel.exchange`.
    """
    try:
        metrics = _check_metrics(metrics)
        counts = _check_batch(log_probs, old_log_probs, advantages, loss_mask, lengths, config)
        chunks = cp.check(counts, config.decay_over == "trained_tokens") if cp is not None else None
    except ValueError:
        if cp is not None:
            cp.refuse(log_probs, old_log_probs, advantages, loss_mask)
        raise
    # Detached for forward-mode differentiation too, which no_grad leaves on.
    batch = tuple(tokens.detach() for tokens in (log_probs, old_log_probs, advantages, loss_mask))
    impl = config.impl
    if impl == "triton" and not (counts.any() and _kernel_agrees(batch, counts, config, cp, chunks, metrics)):
        impl = "scan"
    return _weights(batch, counts, config, cp, chunks, metrics, impl)


def _weights(batch, counts: Tensor, config: FipoConfig, cp, chunks, metrics: tuple[str, ...], impl: str) -> FipoWeights:
    """:func:`fipo_weights` on arguments that it has checked."""
    if impl == "triton":  # everything below, fused
        return FipoWeights(*load_kernel().kernel_weights(*batch, counts, config, cp, chunks, metrics, MAX_SHIFT))
    log_probs, old_log_probs, advantages, loss_mask = batch
    dtype = compute_dtype(log_probs, old_log_probs)
    trained = loss_mask != 0
    negative = advantages < 0

    shift = log_probs.to(dtype) - old_log_probs.to(dtype)
    finite = shift.isfinite()
    shift = torch.where(finite, shift, 0).clamp_(-MAX_SHIFT, MAX_SHIFT)  # Δ_t, Eq. 3

    c = config.dual_clip_c
    above_c = shift > math.log(c) if c is not None else torch.zeros_like(finite)
    participates = trained & ~above_c  # M_t, Eq. 5; a non-finite shift is already 0
    decay_mask = trained if config.decay_over == "trained_tokens" else None
    segments = counts if cp is None else cp.segments(chunks)
    future = compute_future_kl(
        torch.where(participates, shift, 0), segments, config.decay_rate, decay_mask, impl, config.chunk_size
    )
    dual_clipped = per_response_sum(trained & negative & above_c, counts)
    if cp is not None:
        future, dual_clipped = cp.carry(future, dual_clipped, chunks, config.decay_rate, decay_mask)
    if config.max_dual_clipped_tokens is not None:
        keep = dual_clipped <= config.max_dual_clipped_tokens
    else:
        keep = torch.ones_like(dual_clipped, dtype=torch.bool)

    low, high = config.influence_bounds
    unclipped = future.exp()
    influence = unclipped.clamp(low, high)  # f_t, Eq. 7
    if config.safety_thresh is not None:
        capped = negative & (shift > math.log(config.safety_thresh))
        influence = torch.where(capped, influence.clamp(*SAFETY_BOUNDS), influence)
    else:
        capped = torch.zeros_like(negative)
    kept = per_token(keep, counts)

    def negative_ratio_band(start: float, stop: float | None) -> Tensor:
        in_band = negative & (shift >= math.log(start))
        return in_band if stop is None else in_band & (shift < math.log(stop))

    values = {
        "future_kl": lambda: future.clone(),
        "influence_weight": lambda: influence,
        "influence_deviation": lambda: (influence - 1).abs_(),
        "clip_high_frac": lambda: (influence >= high) & (unclipped > high),
        "clip_low_frac": lambda: (influence <= low) & ((unclipped < low) | capped),
        "safety_capped_frac": lambda: capped,
        "excluded_frac": lambda: above_c,
        "dropped_frac": lambda: ~kept,
        "nonfinite_frac": lambda: ~finite,
        "neg_ratio_2_3": lambda: negative_ratio_band(2, 3),
        "neg_ratio_3_4": lambda: negative_ratio_band(3, 4),
        "neg_ratio_4_c": lambda: negative_ratio_band(4, c),
    }
    chosen = {name: values[name]().to(dtype) for name in metrics}
    return FipoWeights(torch.where(kept, influence, 0), future, keep, chosen)


def _kernel_agrees(batch, counts: Tensor, config: FipoConfig, cp, chunks, metrics: tuple[str, ...]) -> bool:
    """Whether kernel and scan give the same for this kind of micro-batch; no collective."""
    log_probs, *others = batch
    alone = None if cp is None else cp.alone()

    def probe():
        moved_batch = (moved(log_probs), *others)
        ours, scan = (
            _weights(moved_batch, counts, config, alone, chunks, metrics, impl) for impl in ("triton", "scan")
        )
        return {"Future-KL": (ours.future_kl, scan.future_kl), "weights": (ours.weights, scan.weights)}

    kind = ("weights", config.decay_over, cp is None, metrics, *(tokens.dtype for tokens in batch))
    return kernel_agrees(log_probs.device, kind, probe)


def _check_metrics(metrics) -> tuple[str, ...]:
    names = tuple(metrics) if isinstance(metrics, Iterable) else (metrics,)
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise ValueError(f"metrics holds {unknown}; it must hold names out of {', '.join(METRICS)}")
    return names


def _check_batch(log_probs, old_log_probs, advantages, loss_mask, lengths, config) -> Tensor:
    if not isinstance(config, FipoConfig):
        raise ValueError(f"config is a {type(config).__name__}; it must be a FipoConfig")
    check_tokens("log_probs", log_probs)
    like = ("log_probs", log_probs)
    check_tokens("old_log_probs", old_log_probs, like)
    check_tokens("advantages", advantages, like, floating=False)
    check_tokens("loss_mask", loss_mask, like, floating=False)
    return check_lengths(lengths, like)
