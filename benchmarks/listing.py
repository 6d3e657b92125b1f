"""The benchmarks' fixed comparator: Future-KL the way the paper's Listing 1 computes it. The package never uses it.

For every chunk of columns it builds an L×K block of float32 powers of γ and multiplies a (B, K) by a (K, L) matrix,
over the whole padded length, past included: O(B·L²) work, and float32 powers that lose accuracy at large τ and L.
"""

import torch
from torch import Tensor


def paper_listing(kl: Tensor, decay_rate: float, chunk_size: int = 128) -> Tensor:
    """Future-KL [B, L] of masked log-ratios ``kl`` [B, L] on a right-padded batch."""
    length = kl.shape[1]
    gamma = torch.tensor(2.0 ** (-1.0 / decay_rate), dtype=kl.dtype, device=kl.device)
    row = torch.arange(length, device=kl.device)[:, None]
    future = torch.zeros_like(kl)
    for start in range(0, length, chunk_size):
        stop = min(start + chunk_size, length)
        distance = torch.arange(start, stop, device=kl.device)[None, :] - row
        decay = torch.pow(gamma, distance.clamp(min=0)) * (distance >= 0)
        future += kl[:, start:stop] @ decay.to(kl.dtype).t()
    return future
