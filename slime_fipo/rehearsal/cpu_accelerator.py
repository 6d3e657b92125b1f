"""A CPU for slime's own registry of accelerators; slime then turns ``nccl`` into gloo by itself.

slime's interface has no CPU backend. What Megatron-LM asks of CUDA is in ``megatron_on_cpu.py``.
"""

from __future__ import annotations

import contextlib
from types import ModuleType

import psutil
import torch


def register(accelerator: ModuleType) -> None:
    """Register ``cpu`` with slime's ``slime.utils.accelerator``; ``SLIME_ACCELERATOR=cpu`` chooses it."""

    class CPUAccelerator(accelerator.Accelerator):
        name = device_type = "cpu"
        communication_backend_name = "gloo"

        def is_available(self):
            return True

        def device(self, index=None):
            return torch.device("cpu")

        def device_name(self, index=None):
            return "cpu"

        def set_device(self, index):
            pass

        def current_device(self):
            return "cpu"

        def device_count(self):
            return 1

        def synchronize(self, device=None):
            pass

        def current_stream(self, device=None):
            return None

        def stream(self, stream):
            return contextlib.nullcontext()

        def empty_cache(self):
            pass

        def mem_get_info(self, device=None):
            memory = psutil.virtual_memory()
            return memory.available, memory.total

        def memory_allocated(self, device=None):
            return psutil.Process().memory_info().rss

        memory_reserved = memory_allocated

        def autocast(self, *args, **kwargs):
            return torch.autocast("cpu", *args, **kwargs)

    accelerator.register_accelerator("cpu", CPUAccelerator, lambda: True, communication_backends=("gloo",))
