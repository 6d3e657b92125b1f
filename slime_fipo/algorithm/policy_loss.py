"""The FIPO policy loss (Eq. 8) for callers without a policy loss of their own.

Hosts that have one multiply ``fipo_weights(...).weights`` onto it instead; aggregation over tokens is the caller's.
"""

from __future__ import annotations

import numbers

import torch
from torch import Tensor

from .config import FipoConfig
from .future_kl import compute_dtype
from .weights import MAX_SHIFT, FipoWeights, fipo_weights


def fipo_policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    lengths,
    config: FipoConfig,
    *,
    eps_clip: float = 0.2,
    eps_clip_high: float = 0.28,
) -> tuple[Tensor, FipoWeights]:
    """Per-token FIPO loss ℓ_t = w_t · PPO-clip with dual clip (Eq. 8).

    Args:
        log_probs: log π_θ(y_t) [T]; the loss's gradient flows through it alone.
        old_log_probs, advantages, loss_mask, lengths, config: as for :func:`fipo_weights`.
        eps_clip: PPO's lower clip; ratios are clipped to [1 − eps_clip, 1 + eps_clip_high].
        eps_clip_high: PPO's upper clip; ``config.dual_clip_c`` must exceed 1 + eps_clip_high.

    Returns:
        ``(per_token_loss [T], FipoWeights)``. The loss is not masked; weight it with ``loss_mask`` when averaging.
        The authors leave dropped responses out of the mean's denominator too (``loss_mask`` on kept responses).

    Raises:
        ValueError: as :func:`fipo_weights`, and for clip ranges out of order.
    """
    for name, value, bound in (("eps_clip", eps_clip, 1.0), ("eps_clip_high", eps_clip_high, None)):
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not is_number or not value >= 0 or (bound is not None and value > bound):
            raise ValueError(
                f"{name} is {value!r}; it must be a number of at least 0" + (f", at most {bound:g}" if bound else "")
            )
    result = fipo_weights(log_probs, old_log_probs, advantages, loss_mask, lengths, config)
    c = config.dual_clip_c
    if c is not None and c <= 1 + eps_clip_high:
        raise ValueError(
            f"config.dual_clip_c is {c:g}; it must be above 1 + eps_clip_high = {1 + eps_clip_high:g}, or None"
        )

    dtype = compute_dtype(log_probs, old_log_probs)
    old_log_probs, advantages = old_log_probs.detach().to(dtype), advantages.detach().to(dtype)
    ratio = (log_probs.to(dtype) - old_log_probs).clamp(-MAX_SHIFT, MAX_SHIFT).exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - eps_clip, 1 + eps_clip_high))
    if c is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * c), loss)
    return loss * result.weights, result
