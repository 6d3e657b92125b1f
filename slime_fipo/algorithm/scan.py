"""Future-KL in linear time: the recurrence F_t = x_t + γ^{d_t} F_{t+1} by odd-even reduction.

Neighbouring tokens are merged in pairs, the half as long recurrence of the pairs is solved the same way, and every
second token is filled in from its right neighbour: about four passes over T elements in all, log2(T) levels, no
padding, and the rounding error of a tree sum. The decay over a span is always taken from its distance, exp2(−d/τ), so
that it neither drifts at large τ nor overflows at small τ; a response's last token has distance infinity to the next
response, whose decay is exactly 0, so that responses never touch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .packed import last_tokens, to_device


def scan_future_kl(shift: Tensor, lengths: Tensor, decay_rate: float, decay_mask: Tensor | None) -> Tensor:
    """F [T] of a finite shift [T] in float32 or float64; ``lengths`` is an int64 CPU tensor [B]."""
    distance = torch.ones_like(shift) if decay_mask is None else (decay_mask != 0).to(shift.dtype)
    distance.index_fill_(0, to_device(last_tokens(lengths), shift.device), math.inf)
    return solve_recurrence(shift, distance, log2_decay_of(decay_rate))


def log2_decay_of(decay_rate: float) -> float:
    """log2 γ = −1/τ, kept finite and below 0 in float32: no distance is no decay, an infinite one decays to 0."""
    return min(max(-1.0 / float(decay_rate), -1e30), -1e-30)


def solve_recurrence(x: Tensor, distance: Tensor, log2_decay: float) -> Tensor:
    """Solve F_i = x_i + exp2(distance_i · log2_decay) F_{i+1} for F [n].

    Args:
        x: finite [n], n ≥ 1.
        distance: [n] from element i to i + 1, of x's dtype; infinite where nothing carries over.
        log2_decay: log2 of the decay per unit of distance, −1/τ.
    """
    n = x.shape[0]
    if n == 1:
        return x
    pairs, has_right = n // 2, (n - 1) // 2  # an odd last element stays alone; the last element has no right neighbour
    left, right = slice(0, 2 * pairs, 2), slice(1, None, 2)

    merged_x = x.new_empty(n - pairs)
    merged_distance = torch.empty_like(merged_x)
    torch.addcmul(x[left], torch.exp2(distance[left] * log2_decay), x[right], out=merged_x[:pairs])
    torch.add(distance[left], distance[right], out=merged_distance[:pairs])
    if pairs != n - pairs:
        merged_x[pairs:] = x[-1:]
        merged_distance[pairs:] = distance[-1:]
    at_left = solve_recurrence(merged_x, merged_distance, log2_decay)

    result = torch.empty_like(x)
    result[0::2] = at_left
    decay = torch.exp2(distance[right][:has_right] * log2_decay)
    torch.addcmul(x[right][:has_right], decay, at_left[1:], out=result[right][:has_right])
    if n % 2 == 0:
        result[-1:] = x[-1:]
    return result
