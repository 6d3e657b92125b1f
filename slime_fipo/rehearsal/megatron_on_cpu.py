"""What Megatron-LM hard-codes for CUDA, answered by the CPU, and its distributed optimizer over torch's AdamW.

Megatron-LM writes ``device="cuda"``, ``.cuda()`` and ``torch.cuda.current_device()`` in its training loop, schedules,
layers and optimizers. Where a flag of Megatron-LM's turns a CUDA path off, the flag is in ``flags.py`` instead.
"""

from __future__ import annotations

import contextlib
from types import ModuleType

import psutil
import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


def _is_cuda(value) -> bool:
    return (isinstance(value, str) and value.startswith("cuda")) or (
        isinstance(value, torch.device) and value.type == "cuda"
    )


class _CudaIsCPU(TorchFunctionMode):
    """Torch functions called for a CUDA device run on the CPU. Covers the thread that entered it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):  # slime's weight backups; pinning needs a GPU's driver
            kwargs["pin_memory"] = False
        if function in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if function is torch.Tensor.to:
            args = tuple(CPU if _is_cuda(value) else value for value in args)
        if function is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Megatron's optimizers sort parameters by this name, and know the CUDA ones alone.
            return function(*args).replace("torch.", "torch.cuda.", 1)
        return function(*args, **kwargs)


class _Stream:
    """A stream of a device that has finished whatever it was given."""

    def __init__(self, *args, **kwargs) -> None:
        pass

    def wait_stream(self, stream) -> None:
        pass

    def synchronize(self) -> None:
        pass


def answer_for_cuda(megatron_core: ModuleType) -> None:
    """Answer in this process for every ``torch.cuda`` function that Megatron-LM calls without asking for a GPU.

    Megatron's generator for model-parallel regions stays torch's default one: with dropout at 0 nothing draws from it.
    """
    cuda = torch.cuda
    cuda.current_device = lambda: CPU
    cuda.set_device = lambda device: None
    cuda.synchronize = cuda.empty_cache = lambda *args, **kwargs: None
    cuda.Stream = _Stream
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: _Stream()
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.get_device_capability = lambda *args: (9, 0)
    cuda.is_bf16_supported = lambda *args, **kwargs: True
    # slime v0.3.1 has no accelerator interface: what it logs of the memory comes from here.
    cuda.mem_get_info = lambda *args: (psutil.virtual_memory().available, psutil.virtual_memory().total)
    cuda.memory_allocated = cuda.memory_reserved = lambda *args: psutil.Process().memory_info().rss
    _CudaIsCPU().__enter__()  # for the rest of the process


def answer_architecture(training_utils: ModuleType) -> None:
    """With tensor or context parallelism Megatron's argument checks ask for the GPU's architecture: Hopper's."""
    training_utils.get_device_arch_version = lambda: 9


def keep_adam_step(distrib_optimizer: ModuleType) -> None:
    """Let Megatron's distributed optimizer save and load the step count of torch's AdamW.

    Without Transformer Engine or Apex it runs on torch's AdamW, and then

    - ``state_dict`` reads ``step`` from the state, which torch makes at the first step: loading a checkpoint into an
      optimizer that has not stepped stops with ``assert len(steps) == 1``;
    - ``load_state_dict`` gives one tensor to all parameters, which each of them counts up at every step;
    - a parameter's state holds ``step``, where every format of checkpoint takes each entry for a tensor of the
      parameter's shape. Megatron keeps ``step`` with the parameter groups.
    """
    optimizer_class = distrib_optimizer.DistributedOptimizer
    construct, load_state_dict = optimizer_class.__init__, optimizer_class.load_state_dict
    get_states = optimizer_class._get_main_param_and_optimizer_states
    set_states = optimizer_class._set_main_param_and_optimizer_states

    def __init__(self, *args, **kwargs):
        construct(self, *args, **kwargs)
        if not isinstance(self.optimizer, (torch.optim.Adam, torch.optim.AdamW)):
            return
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                # As torch's AdamW makes it at its first step.
                state = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[parameter] = {"step": torch.tensor(0.0), **state}

    def load_state_dict_with_own_steps(self, state_dict):
        load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()

    def get_states_but_step(self, model_param):
        return {name: value for name, value in get_states(self, model_param).items() if name != "step"}

    def set_states_but_step(self, model_param, tensors):
        group, order = self.model_param_group_index_map[model_param]
        own = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        step = {"step": own["step"]} if "step" in own else {}
        set_states(self, model_param, {**step, **tensors})

    optimizer_class.__init__ = __init__
    optimizer_class._get_main_param_and_optimizer_states = get_states_but_step
    optimizer_class._set_main_param_and_optimizer_states = set_states_but_step
    optimizer_class.load_state_dict = load_state_dict_with_own_steps
