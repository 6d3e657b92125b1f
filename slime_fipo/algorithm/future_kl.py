"""Future-KL (Eq. 6): the discounted sum of the policy's log-ratio over a token and everything after it.

``future_kl`` is the one public function; ``impl`` chooses among implementations that compute the same numbers:

- ``chunked_future_kl``: the paper's Listing 1, a matrix product per chunk of columns on padded batches. O(B·L²).
  The readable reference.
- ``scan_future_kl`` (``scan.py``): the recurrence F_t = x_t + γ F_{t+1} by pairwise reduction. O(tokens).
- ``kernel_future_kl`` (``kernel.py``): the recurrence in Triton, blocks of each response in parallel. O(tokens).
  Used once ``kernel_check.py`` has seen it agree with the scan.

What else is in the batch makes no difference to a response: bit for bit in the scan, whatever the values, lengths and
places; up to rounding in the other two, which cut their sums by the longest response and by the batch's blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .config import IMPLEMENTATIONS, check_integer, check_number, refuse
from .kernel_check import kernel_agrees, load_kernel, moved
from .packed import check_lengths, check_tokens
from .scan import log2_decay_of, scan_future_kl


@torch._disable_dynamo  # as fipo_weights
@torch.no_grad()
def future_kl(
    shift: Tensor,
    lengths,
    decay_rate: float,
    *,
    decay_mask: Tensor | None = None,
    impl: str = "auto",
    chunk_size: int = 128,
) -> Tensor:
    """Future-KL of every token: F_t = Σ_{k≥t} γ^{d(t,k)} x_k within its response, γ = 2^(−1/τ) (Eq. 6).

    d(t, k) is k − t, or with ``decay_mask`` the number of tokens in [t, k) that the mask counts.

    Args:
        shift: x [T], the masked log-ratio M_t Δ_t in nats, packed; any floating dtype. A non-finite entry
            counts as 0, so that it cannot spread to other tokens.
        lengths: response lengths, B integers ≥ 0 that add up to T.
        decay_rate: τ > 0, the half-life in tokens.
        decay_mask: [T], non-zero where a token counts as distance; all tokens do by default.
        impl: ``"chunked"``, ``"scan"``, ``"triton"`` (where it cannot run or disagrees with the scan, one warning is
            logged and the scan computes), or ``"auto"``, which is ``"scan"``.
        chunk_size: columns per matrix product of ``"chunked"``; the result does not depend on it.

    Returns:
        F [T], detached; float64 for float64 shifts unless by ``"triton"``, else float32.

    Raises:
        ValueError: an argument has the wrong type, shape, device or range; the message names it.
    """
    check_tokens("shift", shift)
    counts = check_lengths(lengths, ("shift", shift))
    if decay_mask is not None:
        check_tokens("decay_mask", decay_mask, ("shift", shift), floating=False)
    check_number("decay_rate", decay_rate, lambda x: x > 0, "a finite number above 0 (half-life in tokens)")
    check_integer("chunk_size", chunk_size, 1)
    if impl not in IMPLEMENTATIONS:
        refuse("impl", impl, f"one of {', '.join(map(repr, IMPLEMENTATIONS))}")
    shift = shift.detach()
    if impl == "triton" and shift.numel():

        def probe():
            x = moved(shift.clamp(-1, 1))
            ours = load_kernel().kernel_future_kl(x, counts, decay_rate, decay_mask)
            return {"Future-KL": (ours, future_kl(x, counts, decay_rate, decay_mask=decay_mask))}

        kind = ("future_kl", shift.dtype, decay_mask is not None and decay_mask.dtype)
        if kernel_agrees(shift.device, kind, probe):
            return load_kernel().kernel_future_kl(shift, counts, decay_rate, decay_mask)
    shift = shift.to(compute_dtype(shift))
    shift = torch.where(shift.isfinite(), shift, 0)
    return compute_future_kl(shift, counts, decay_rate, decay_mask, impl, chunk_size)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is float64, else float32: half precision is never computed in."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def compute_future_kl(shift: Tensor, lengths: Tensor, decay_rate, decay_mask, impl: str, chunk_size: int) -> Tensor:
    """``chunked``, or else the scan, of a finite shift [T] in its compute dtype; ``lengths`` is an int64 CPU tensor."""
    if shift.numel() == 0:
        return torch.zeros_like(shift)
    if impl == "chunked":
        return chunked_future_kl(shift, lengths, decay_rate, decay_mask, chunk_size)
    return scan_future_kl(shift, lengths, decay_rate, decay_mask)


def chunked_future_kl(shift: Tensor, lengths: Tensor, decay_rate, decay_mask, chunk_size: int) -> Tensor:
    """The paper's chunked matrix form (Listing 1, App. C): one decay block and one matrix product per chunk of columns.

    Unlike the listing it takes the decay as exp2(−distance/τ), not as float32 powers of γ, which lose accuracy at
    large τ and L, and multiplies in float64, which neither autocast nor reduced-precision matrix products touch.
    """
    sizes = lengths.tolist()
    x = pad_sequence(shift.double().split(sizes), batch_first=True)  # [B, L]
    length = x.shape[1]
    row = torch.arange(length, device=x.device)
    if decay_mask is None:
        position = row.to(x.dtype)[None]  # [1, L]: the same for every response
    else:
        counted = pad_sequence((decay_mask != 0).to(x.dtype).split(sizes), batch_first=True)
        position = counted.cumsum(1) - counted  # [B, L]: counted tokens before this one

    future = torch.zeros_like(x)
    for start in range(0, length, chunk_size):
        stop = min(start + chunk_size, length)
        distance = position[:, None, start:stop] - position[:, :stop, None]  # [1 or B, stop, K], k − t
        decay = torch.exp2(distance * log2_decay_of(decay_rate))
        decay = torch.where(row[start:stop] >= row[:stop, None], decay, 0)  # the future only: k ≥ t
        future[:, :stop] += (decay @ x[:, start:stop, None]).squeeze(-1)
    return torch.cat([future[i, :n] for i, n in enumerate(sizes)]).to(shift.dtype)
