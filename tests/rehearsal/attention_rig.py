"""The layer spec's attention on real gloo ranks: ``python attention_rig.py OUT``.

Each rank of CP 2 holds its zigzag chunks of packed sequences; outputs and gradients are compared with PyTorch's own
causal attention over each whole sequence. OUT gets the largest differences.
"""

import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from megatron.core import parallel_state

from slime_fipo.rehearsal.layer_spec import PackedAttention, zigzag_positions

HEADS, GROUPS, SIZE = 4, 2, 8
LENGTHS = {1: [5, 1, 12, 7, 2], 2: [8, 4, 16, 4]}  # under CP slime pads to a multiple of twice the ranks


def whole_attention(query, key, value):
    """[tokens, heads, d] of one sequence -> [tokens, heads * d]."""
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1).flatten(1)


def compare(rank: int, ranks: int, store: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    parallel_state.initialize_model_parallel(context_parallel_size=ranks)
    generator = torch.Generator().manual_seed(0)
    lengths = LENGTHS[ranks]
    inputs = [
        [torch.randn(length, heads, SIZE, generator=generator, dtype=torch.float64) for length in lengths]
        for heads in (HEADS, GROUPS, GROUPS)
    ]
    upstream = [torch.randn(length, HEADS * SIZE, generator=generator, dtype=torch.float64) for length in lengths]
    mine = [zigzag_positions(length // ranks, rank, ranks) for length in lengths]

    whole = [[x.clone().requires_grad_() for x in one] for one in inputs]
    expected = [whole_attention(*qkv) for qkv in zip(*whole, strict=True)]
    torch.autograd.backward(expected, upstream)

    local = [torch.cat([x[m] for x, m in zip(one, mine, strict=True)]).requires_grad_() for one in inputs]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    attention = PackedAttention(None, 1, None, "self")
    actual = attention(*local, packed_seq_params=SimpleNamespace(cu_seqlens_q=bounds))
    actual.backward(torch.cat([x[m] for x, m in zip(upstream, mine, strict=True)]))

    def difference(a, parts) -> float:
        return (a - torch.cat([x[m] for x, m in zip(parts, mine, strict=True)])).abs().max().item()

    differences = [difference(actual, expected)]
    differences += [difference(x.grad, [y.grad for y in one]) for x, one in zip(local, whole, strict=True)]
    Path(out, f"cp{ranks}-{rank}.json").write_text(json.dumps(differences))


if __name__ == "__main__":
    for ranks in LENGTHS:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(compare, (ranks, f"{folder}/store", sys.argv[1]), nprocs=ranks)
