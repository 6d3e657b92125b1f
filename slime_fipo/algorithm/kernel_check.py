"""Whether the Triton kernel may compute, decided on the first micro-batch of each kind that a device sees.

Who asks for ``triton`` gets it checked first: kernel and scan compute the same probe, that micro-batch with its
log-ratios moved, since on policy they are all 0 and a wrong kernel could pass. No Triton, no C compiler, a compile
error, or a difference beyond ``TOLERANCE`` is one warning per process and device, and the scan computes from then on.
Afterwards nothing is compared and nothing waits for the device. With context parallelism the probe needs no
collective, and both ways make the same one afterwards, so that a rank may fall back while the others do not.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# Relative to the largest Future-KL, or to 1 where that is smaller. The tests hold kernel and scan to 1e-5 of float64
# each: ten times that leaves room for another device's rounding, and a wrong kernel is off by the log-ratios' own size.
TOLERANCE = 1e-4

_agreed: set[tuple] = set()  # kinds of micro-batch that were checked, by device and what makes Triton compile anew
refused_devices: set[torch.device] = set()


@functools.cache
def load_kernel() -> ModuleType:
    """``kernel.py``, imported when first wanted, so that the package works and loads fast without Triton."""
    from . import kernel

    return kernel


Probe = Callable[[], dict[str, tuple[Tensor, Tensor]]]


def kernel_agrees(device: torch.device, kind: tuple, probe: Probe) -> bool:
    """True if the kernel agrees with the scan on ``device``, or did before on this kind of micro-batch.

    Args:
        device: where the tokens are.
        kind: what makes the kernel another program: launches, options, dtypes.
        probe: computes the probe both ways; name -> (kernel's, scan's), each of at least one element.
    """
    if device in refused_devices:
        return False
    if (device, kind) in _agreed:
        return True
    reason = _disagreement(probe)
    if reason is None:
        _agreed.add((device, kind))
        return True
    refused_devices.add(device)
    logger.warning("--fipo-impl triton cannot be used on %s, the scan computes instead: %s", device, reason)
    return False


def _disagreement(probe: Probe) -> str | None:
    try:
        load_kernel()
    except Exception as error:  # a broken installation raises anything
        return f"Triton cannot be imported ({_one_line(error)}); pip install triton"
    try:
        values = probe()
        bound = TOLERANCE * max(1.0, *(scan.abs().max().item() for _, scan in values.values()))
        for name, (ours, scan) in values.items():
            off = (ours.to(scan.dtype) - scan).abs().max().item()
            if not off <= bound:  # NaN is off
                return f"its {name} differs from the scan's by {off:.2g}, more than {bound:.2g}"
    except Exception as error:  # Triton, its compilers and the driver have no common error
        return _one_line(error)
    return None


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{'…' if len(text) > 300 else ''}"


def moved(log_ratio: Tensor) -> Tensor:
    """``log_ratio`` [T] plus values of both signs, different from token to token, a few beyond the usual thresholds."""
    position = torch.arange(log_ratio.numel(), device=log_ratio.device)
    wave = torch.sin(0.7 * position) * 0.1 + torch.where(position % 257 == 7, 3.0, 0.0)
    return log_ratio + wave.to(log_ratio.dtype)
