"""slime's process groups under a torch that is newer than the one that slime's SGLang pins."""

from __future__ import annotations

from types import ModuleType

import torch.distributed as dist

# torch 2.13 calls a group's collectives by these names; 2.11, which SGLang 0.5.15.post1 pins, by others.
NEW_NAMES = (
    *("all_gather_single", "all_gather_single_coalesced", "all_to_all_single"),
    *("reduce_scatter_single", "reduce_scatter_single_coalesced"),
)


def forward_new_names(reloadable_process_group: ModuleType) -> None:
    """Let slime's wrapper of a group pass these on as it does the others.

    Megatron-LM keeps torch's functions from before slime replaces them, so such a call meets the wrapper itself, which
    has no backend: sequence parallelism stops at its first reduce-scatter.
    """
    for name in NEW_NAMES:
        if hasattr(dist.ProcessGroup, name):
            setattr(reloadable_process_group.ReloadableProcessGroup, name, _forward(name))


def _forward(name: str):
    return lambda group, *args, **kwargs: group._fwd(name, *args, **kwargs)
