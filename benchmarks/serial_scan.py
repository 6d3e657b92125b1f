"""A comparator of ``make bench-gpu``: Future-KL by one GPU thread per response, token after token from the last to the
first, as public scan kernels do it. Never used by the package.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _walk(shift, offsets, future, responses, longest, decay, LANES: tl.constexpr):
    response = tl.program_id(0) * LANES + tl.arange(0, LANES)
    inside = response < responses
    start = tl.load(offsets + response, mask=inside, other=0)
    end = tl.load(offsets + response + 1, mask=inside, other=0)
    carry = tl.zeros([LANES], tl.float32)
    for step in range(1, longest + 1):
        token = end - step
        own = token >= start
        carry = tl.load(shift + token, mask=own & inside, other=0.0) + decay * carry
        tl.store(future + token, carry, mask=own & inside)


def serial_future_kl(shift: Tensor, offsets: Tensor, longest: int, decay_rate: float) -> Tensor:
    """Future-KL [T] of a packed float32 shift [T]; ``offsets`` [B + 1] say where responses start and the last ends."""
    future = torch.empty_like(shift)
    responses, lanes = offsets.numel() - 1, 32
    _walk[(triton.cdiv(responses, lanes),)](
        shift, offsets, future, responses, longest, 2.0 ** (-1.0 / decay_rate), LANES=lanes, num_warps=1
    )
    return future
