"""The FIPO policy loss (Eq. 8) for callers without a policy loss of their own.

Hosts that have one multiply ``fipo_weights(...).weights`` onto it instead; aggregation over tokens is the caller's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .config import LARGEST, FipoConfig, check_number
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
        ``(per_token_loss [T], FipoWeights)``. The loss and its gradient are 0 where ``loss_mask`` is 0, whatever stands
        there; a NaN on a trained token stays NaN. Average with ``loss_mask``.
        The authors leave dropped responses out of the mean's denominator too (``loss_mask`` on kept responses).

    Raises:
        ValueError: as :func:`fipo_weights`, and for clip ranges out of order.
    """
    check_number("eps_clip", eps_clip, lambda x: 0 <= x <= 1, "a number in [0, 1]")
    check_number("eps_clip_high", eps_clip_high, lambda x: 0 <= x <= LARGEST, "a finite number of at least 0")
    result = fipo_weights(log_probs, old_log_probs, advantages, loss_mask, lengths, config)
    c = config.dual_clip_c
    if c is not None and c <= 1 + eps_clip_high:
        raise ValueError(
            f"config.dual_clip_c is {c:g}; it must be above 1 + eps_clip_high = {1 + eps_clip_high:g}, or None"
        )

    dtype = compute_dtype(log_probs, old_log_probs)
    trained = loss_mask != 0
    old_log_probs, advantages = old_log_probs.detach().to(dtype), advantages.detach().to(dtype)
    # Masked before exp too: a gradient of 0 times NaN would be NaN.
    ratio = torch.where(trained, log_probs.to(dtype) - old_log_probs, 0).clamp(-MAX_SHIFT, MAX_SHIFT).exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - eps_clip, 1 + eps_clip_high))
    if c is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * c), loss)
    return torch.where(trained, loss * result.weights, 0), result
