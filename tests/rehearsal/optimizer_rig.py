"""Megatron's real distributed optimizer in a rehearsal: ``python optimizer_rig.py OUT``, stand-ins on PYTHONPATH.

Trains three steps, saves a checkpoint, trains three more; then loads into an optimizer that has not stepped and trains
the same three. OUT gets both results, for each format of checkpoint.
"""

import json
import sys
import tempfile

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.transformer_config import TransformerConfig


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linears = torch.nn.ModuleList(torch.nn.Linear(6, 6, bias=False, dtype=torch.bfloat16) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for linear in self.linears:
            x = torch.tanh(linear(x))
        return x


def make():
    config = TransformerConfig(num_layers=1, hidden_size=6, num_attention_heads=1)
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    model = DistributedDataParallel(config, ddp_config, Model())
    settings = OptimizerConfig(optimizer="adam", lr=0.1, bf16=True, use_distributed_optimizer=True, clip_grad=1.0)
    return model, get_megatron_optimizer(settings, [model])


def train(model, optimizer, steps: range) -> None:
    for step in steps:
        model.zero_grad_buffer()
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step)).to("cuda", torch.bfloat16)
        model(x).float().square().mean().backward()
        model.finish_grad_sync()
        optimizer.step()


def result(model, optimizer) -> dict:
    inner = optimizer.chained_optimizers[0].optimizer
    return {
        "weights": [p.float().flatten().tolist() for p in model.parameters()],
        "steps": [state["step"].item() for state in inner.state.values()],
    }


def main(out: str) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    results = {}
    for form in ("dp_reshardable", "dp_zero_gather_scatter"):  # slime's Megatron writes the first
        metadata = {"distrib_optim_sharding_type": form, "chained_optim_avoid_prefix": True}
        model, optimizer = make()
        train(model, optimizer, range(3))
        with tempfile.TemporaryDirectory() as folder:
            saved = optimizer.sharded_state_dict({}, is_loading=False, metadata=metadata)
            dist_checkpointing.save({"optimizer": saved}, folder)
            weights = [p.detach().clone() for p in model.parameters()]
            train(model, optimizer, range(3, 6))

            loaded_model, loaded = make()
            with torch.no_grad():
                for parameter, weight in zip(loaded_model.parameters(), weights, strict=True):
                    parameter.copy_(weight)
            form_to_load = loaded.sharded_state_dict({}, is_loading=True, metadata=metadata)
            loaded.load_state_dict(dist_checkpointing.load({"optimizer": form_to_load}, folder)["optimizer"])
        train(loaded_model, loaded, range(3, 6))
        results[form] = [result(model, optimizer), result(loaded_model, loaded)]
    with open(out, "w") as file:
        json.dump(results, file)


if __name__ == "__main__":
    main(sys.argv[1])
