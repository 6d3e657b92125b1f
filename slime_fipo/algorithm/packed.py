"""The packed layout: per-token tensors of all responses of a batch end to end, beside a list of response lengths.

Checks of what callers pass in, and the few index tensors that the layout needs. Nothing here reads a
tensor's values back to the host.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_tokens(name: str, value, like: tuple[str, Tensor] | None = None, *, floating: bool = True) -> None:
    """Require a 1-D tensor, of a floating dtype if asked, with the length and device of ``like`` (name, tensor).

    Raises:
        ValueError: names the argument, what it got and what it must be.
    """
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}; it must be a 1-D torch.Tensor of packed tokens")
    if value.dim() != 1:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be 1-D: all responses' tokens end to end")
    if floating and not value.is_floating_point():
        raise ValueError(f"{name} has dtype {value.dtype}; it must be a floating dtype (bf16, fp16, fp32 or fp64)")
    if value.is_complex():
        raise ValueError(f"{name} has dtype {value.dtype}; it must be real")
    if like is not None:
        other_name, other = like
        if value.shape != other.shape:
            raise ValueError(f"{name} has {value.numel()} tokens; it must have {other.numel()}, as {other_name} has")
        if value.device != other.device:
            raise ValueError(f"{name} is on {value.device}; it must be on {other.device}, as {other_name} is")


def check_lengths(lengths, tokens: tuple[str, Tensor] | None = None, *, name: str = "lengths") -> Tensor:
    """Lengths as an int64 CPU tensor [B]; they must add up to the token count of ``tokens`` (name, tensor), if given.

    Raises:
        ValueError: not a sequence of integers ≥ 0, or they do not add up.
    """
    wanted = "it must be a list of response lengths, integers of at least 0"
    if not isinstance(lengths, (list, tuple, range, Tensor)) and not hasattr(lengths, "__array__"):
        raise ValueError(f"{name} is a {type(lengths).__name__}; {wanted}")
    try:
        counts = torch.as_tensor(lengths, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{name} is {lengths!r}; {wanted}") from error
    if counts.dim() != 1:
        raise ValueError(f"{name} has shape {tuple(counts.shape)}; it must be 1-D: one length per response")
    if counts.numel() == 0:
        counts = counts.long()
    if counts.is_floating_point() or counts.is_complex() or counts.dtype == torch.bool:
        raise ValueError(f"{name} holds {counts.dtype}; {wanted}")
    counts = counts.long()
    if counts.numel() and int(counts.min()) < 0:
        raise ValueError(f"{name} holds {int(counts.min())}; {wanted}")
    if tokens is not None and int(counts.sum()) != tokens[1].numel():
        raise ValueError(
            f"{name} add up to {int(counts.sum())}; they must add up to {tokens[1].numel()}, the tokens in {tokens[0]}"
        )
    return counts


def to_device(index: Tensor, device: torch.device) -> Tensor:
    """Move a small CPU tensor to ``device`` without making the host wait for it."""
    if device.type == "cuda":
        return index.pin_memory().to(device, non_blocking=True)
    return index.to(device)


def per_response_sum(tokens: Tensor, lengths: Tensor) -> Tensor:
    """Number of true entries of a bool tensor [T] in each response, int32 [B] on the tokens' device."""
    before = torch.cat([tokens.new_zeros(1), tokens]).cumsum(0, dtype=torch.int32)
    ends = to_device(lengths.cumsum(0), tokens.device)
    return before[ends] - before[ends - to_device(lengths, tokens.device)]


def per_token(values: Tensor, lengths: Tensor) -> Tensor:
    """Repeat one value per response [B] over that response's tokens, [T]."""
    total = int(lengths.sum())
    return torch.repeat_interleave(values, to_device(lengths, values.device), output_size=total)
