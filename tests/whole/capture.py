"""What slime's actor had at each optimizer step: a hook that saves the weights before it and its gradients.

slime's own ``--save-debug-train-data FOLDER/{rollout_id}.pt`` saves the samples; these files go beside them.
"""

from pathlib import Path

import torch
import torch.distributed as dist


def before_train_step(args, rollout_id, step_id, model, optimizer, scheduler) -> None:
    """For ``--custom-megatron-before-train-step-hook-path``; FOLDER gets ``rollout-step.pt`` with both."""
    (chunk,) = model  # no pipeline
    parameters = {name.removeprefix("module."): parameter for name, parameter in chunk.named_parameters()}
    weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def step():
        del optimizer.step  # this one; the optimizer's own is its class's
        _gather_shards(chunk)
        if dist.get_rank() == 0:
            gradients = {name: parameter.main_grad.clone() for name, parameter in parameters.items()}
            file = Path(args.save_debug_train_data).with_name(f"{rollout_id}-{step_id}.pt")
            torch.save({"weights": weights, "gradients": gradients}, file)
        return optimizer.step()

    optimizer.step = step  # gradients are complete when it is called, and not yet clipped


def _gather_shards(chunk) -> None:
    """Megatron's distributed optimizer leaves each rank with its shard of the gradients; give all of them to all."""
    for buffer in chunk.buffers:
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            shards = list(bucket.grad_data.chunk(group.size()))
            dist.all_gather(shards, shards[group.rank()].clone(), group=group)
