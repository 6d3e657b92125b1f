"""The layer spec under tensor and sequence parallelism on real gloo ranks: ``python sequence_parallel_rig.py OUT``.

A small Qwen3-shaped GPTModel at TP 2, with and without sequence parallelism, has the weights of one at TP 1; logits and
every parameter's gradient, finalized by Megatron, are compared with that model's. OUT gets the largest differences.
"""

import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig

from slime_fipo.rehearsal.layer_spec import layer_spec

VOCABULARY, LENGTHS = 14, (5, 1, 12, 6)
ARGS = SimpleNamespace(normalization="RMSNorm", num_experts=None, qk_layernorm=True)


def make(ranks: int, sequence_parallel: bool) -> DistributedDataParallel:
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=8,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        qk_layernorm=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=ranks,
        sequence_parallel=sequence_parallel,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
    )
    model = GPTModel(
        config,
        layer_spec(ARGS, config),
        vocab_size=VOCABULARY,
        max_sequence_length=64,
        parallel_output=False,
        share_embeddings_and_output_weights=True,
        position_embedding_type="rope",
    )
    return DistributedDataParallel(config, DistributedDataParallelConfig(), model)


def part(name: str, whole: torch.Tensor, parameter: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    """The part of a TP 1 model's weight or gradient that ``rank`` holds."""
    if whole.shape == parameter.shape:
        return whole
    if "linear_fc1" in name:  # gate and up are two matrices
        return torch.cat([half.chunk(ranks)[rank] for half in whole.chunk(2)])
    return whole.chunk(ranks, parameter.partition_dim)[rank]


def step(model) -> torch.Tensor:
    """Logits [1, tokens, vocabulary]; the gradients are in ``main_grad``."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCABULARY, (1, sum(LENGTHS)), generator=generator)
    upstream = torch.randn(1, sum(LENGTHS), VOCABULARY, generator=generator)
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    longest = max(LENGTHS)
    packed = PackedSeqParams("thd", bounds, bounds, max_seqlen_q=longest, max_seqlen_kv=longest)
    logits = model(tokens, None, None, packed_seq_params=packed)
    (logits * upstream).sum().backward()
    finalize_model_grads([model])
    return logits.detach()


def run(rank: int, ranks: int, sequence_parallel: bool, store: str, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)
    model_parallel_cuda_manual_seed(0)
    model = make(ranks, sequence_parallel)
    parameters = {name.removeprefix("module."): value for name, value in model.named_parameters()}
    whole = Path(folder, "whole.pt")
    if ranks == 1:
        generator = torch.Generator().manual_seed(2)
        for parameter in parameters.values():  # norms' weights too: ones would hide a wrong one
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
        weights = {name: value.detach().clone() for name, value in parameters.items()}
        logits = step(model)
        torch.save((weights, logits, {name: value.main_grad for name, value in parameters.items()}), whole)
        return
    weights, logits, gradients = torch.load(whole)
    for name, parameter in parameters.items():
        parameter.data.copy_(part(name, weights[name], parameter, rank, ranks))
    differences = {"logits": (step(model) - logits).abs().max().item()}
    for name, parameter in parameters.items():
        expected = part(name, gradients[name], parameter, rank, ranks)
        differences[name] = ((parameter.main_grad - expected).abs().max() / expected.abs().max()).item()
    Path(folder, f"sp{int(sequence_parallel)}-{rank}.json").write_text(json.dumps(differences))


if __name__ == "__main__":
    for ranks, sequence_parallel in ((1, False), (2, False), (2, True)):
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(run, (ranks, sequence_parallel, f"{folder}/store", sys.argv[1]), nprocs=ranks)
