"""Future-KL in linear time: the recurrence F_t = x_t + γ^{d_t} F_{t+1} by odd-even reduction in rows.

Every response is cut into rows of ``ROW`` tokens, counted from its end. Inside a row neighbouring tokens are merged in
pairs until one number is left, the Future-KL at the row's first token from the row alone; the rows of a response are
joined by doubling the span that each has seen; then every second token is filled in from its right neighbour. That is
about four passes over T elements in all and the rounding error of a tree sum. Which additions a token takes part in
depends only on its distance from its response's end, so neither values nor lengths of other responses can reach it.
The decay over a span is always taken from its distance, exp(−d ln 2 / τ), so that it neither drifts at large τ nor
overflows at small τ.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .packed import to_device

ROW = 32  # tokens; a power of two. A response is padded to whole rows, which costs at most ROW − 1 tokens


def scan_future_kl(shift: Tensor, lengths: Tensor, decay_rate: float, decay_mask: Tensor | None) -> Tensor:
    """F [T] of a finite shift [T] in float32 or float64, T ≥ 1; ``lengths`` is an int64 CPU tensor [B]."""
    log_decay = log_decay_of(decay_rate)
    rows = (lengths + ROW - 1) // ROW
    pads = (rows * ROW - lengths).tolist()
    sizes = lengths.tolist()

    def in_rows(tokens: Tensor) -> Tensor:
        parts = [*tokens.new_zeros(sum(pads)).split(pads), *tokens.split(sizes)]
        return torch.cat([part for pair in zip(parts[: len(sizes)], parts[len(sizes) :], strict=True) for part in pair])

    def decay_over(span: int) -> Tensor:
        """Decay over ``span`` tokens; with a mask over those that count, which ``distance`` holds."""
        if distance is not None:
            # Not exp2: on a CPU its last bit depends on where in the tensor an element stands.
            return (distance * log_decay).exp_()
        return x.new_full((), math.exp(span * log_decay)).expand_as(x)

    x = in_rows(shift)
    distance = None if decay_mask is None else in_rows((decay_mask != 0).to(shift.dtype))
    merged = []
    for level in range(ROW.bit_length() - 1):
        decay = decay_over(2**level)
        merged.append((x, decay))
        x = torch.addcmul(x[0::2], decay[0::2], x[1::2])
        distance = None if distance is None else distance[0::2] + distance[1::2]

    # x, one number per row. Before each round it covers ``span`` rows, or all that follow in the response.
    following = torch.arange(x.numel() - 1, -1, -1) - torch.repeat_interleave(x.numel() - rows.cumsum(0), rows)
    following = to_device(following, x.device)
    span = 1
    while span < int(rows.max()):
        joined = torch.addcmul(x[:-span], decay_over(span * ROW)[:-span], x[span:])
        x = torch.cat([torch.where(following[:-span] >= span, joined, x[:-span]), x[-span:]])
        if distance is not None:
            distance = torch.cat([distance[:-span] + distance[span:], distance[-span:]])
        span *= 2

    behind = torch.where(following >= 1, x.roll(-1), 0)  # what follows each row, 0 at a response's end
    for local, decay in reversed(merged):
        future = torch.empty_like(local)
        future[0::2] = x
        torch.addcmul(local[1:-1:2], decay[1:-1:2], x[1:], out=future[1:-1:2])
        last = slice(local.numel() // behind.numel() - 1, None, local.numel() // behind.numel())
        torch.addcmul(local[last], decay[last], behind, out=future[last])
        x = future
    return torch.cat(x.split([size for pair in zip(pads, sizes, strict=True) for size in pair])[1::2])


def log2_decay_of(decay_rate: float) -> float:
    """log2 γ = −1/τ, kept finite and below 0 in float32: no distance is no decay, an infinite one decays to 0."""
    return min(max(-1.0 / float(decay_rate), -1e30), -1e-30)


def log_decay_of(decay_rate: float) -> float:
    """ln γ, with the same bounds."""
    return log2_decay_of(decay_rate) * math.log(2)
