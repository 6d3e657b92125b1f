"""``--spec slime_fipo.rehearsal.layer_spec layer_spec``: Megatron's local layers under Transformer Engine's names.

slime's converters between Megatron and Hugging Face know Transformer Engine's parameter names alone, and its packed
(thd) batches need an attention that knows where a sequence ends; Megatron's local spec has neither. Dense decoder
layers with RMSNorm; on any device, slowly.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import mpu
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from ..algorithm.context_parallel import own_chunks


def layer_spec(args, config, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """slime calls this with its namespace and Megatron's ``TransformerConfig``.

    Raises:
        ValueError: the model has experts or another norm than RMSNorm, or batches are not packed; names the flag.
    """
    if args.normalization != "RMSNorm":
        raise ValueError(f"--normalization {args.normalization}: this layer spec has RMSNorm alone")
    if args.num_experts:
        raise ValueError(f"--num-experts {args.num_experts}: this layer spec has dense layers alone")
    if getattr(args, "qkv_format", "thd") != "thd" or getattr(args, "allgather_cp", False):
        raise ValueError("--qkv-format bshd and --allgather-cp: this layer spec has packed sequences in zigzag alone")
    spec = get_gpt_layer_local_spec(qk_layernorm=args.qk_layernorm, normalization=args.normalization)
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = IdentityOp  # they are in the linear layers
    attention = layer.self_attention.submodules
    attention.linear_qkv = LayerNormColumnParallelLinear
    attention.core_attention = PackedAttention
    if args.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    layer.mlp.submodules.linear_fc1 = LayerNormColumnParallelLinear
    return TransformerBlockSubmodules([spec] * get_num_layers_to_build(config, vp_stage), layer_norm=RMSNorm)


def _norm_weight(config, size: int) -> torch.nn.Parameter:
    start = torch.zeros if config.layernorm_zero_centered_gamma else torch.ones
    weight = torch.nn.Parameter(start(size, dtype=config.params_dtype))
    # Under sequence parallelism a rank sees a part of the tokens, and Megatron sums the gradients of such weights.
    weight.sequence_parallel = config.sequence_parallel
    return weight


def _rms_norm(hidden: torch.Tensor, weight: torch.Tensor, config, epsilon: float) -> torch.Tensor:
    weight = weight + 1 if config.layernorm_zero_centered_gamma else weight
    return F.rms_norm(hidden, weight.shape, weight, epsilon)


class RMSNorm(torch.nn.Module):
    """RMSNorm that also runs under sequence parallelism and with zero-centred weights; Megatron's local one refuses."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **_) -> None:
        super().__init__()
        self.config, self.eps = config, eps
        self.weight = _norm_weight(config, hidden_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return _rms_norm(hidden, self.weight, self.config, self.eps)


class LayerNormColumnParallelLinear(ColumnParallelLinear):
    """RMSNorm, then a column-parallel linear layer: the parameters of Transformer Engine's layer of this name."""

    def __init__(self, input_size: int, output_size: int, *, config, **kwargs) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.layer_norm_weight = _norm_weight(config, input_size)

    def forward(self, hidden: torch.Tensor, *args, **kwargs):
        hidden = _rms_norm(hidden, self.layer_norm_weight, self.config, self.config.layernorm_epsilon)
        return super().forward(hidden, *args, **kwargs)


class _AllGather(torch.autograd.Function):
    """[…] on each rank -> [ranks, …] on all; the gradient is summed over the ranks."""

    @staticmethod
    def forward(ctx, part: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        parts = [torch.empty_like(part) for _ in range(group.size())]
        dist.all_gather(parts, part.contiguous(), group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        total = gradient.float()  # bfloat16 sums over ranks lose digits
        dist.all_reduce(total, group=ctx.group)
        return total[ctx.group.rank()].to(gradient.dtype), None


def zigzag_positions(length: int, rank: int, ranks: int) -> torch.Tensor:
    """Positions of the ``length`` tokens that ``rank`` holds of a sequence: slime's chunks r and 2n - 1 - r of 2n."""
    half = length // 2
    first, second = torch.arange(half), torch.arange(length - half)
    early, late = own_chunks(rank, ranks)
    return torch.cat([first + early * half, second + late * half])


class PackedAttention(torch.nn.Module):
    """Causal attention within each packed sequence, exact under context parallelism over slime's zigzag chunks.

    Keys and values of all ranks are gathered, and each query sees the positions up to its own.
    """

    def __init__(self, config, layer_number, attn_mask_type, attention_type, softmax_scale=None, **_) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale

    def forward(self, query, key, value, attention_mask=None, *, packed_seq_params, **_) -> torch.Tensor:
        """query [tokens, heads, d], key and value [tokens, groups, d] -> [tokens, heads * d]; tokens of this rank."""
        group = mpu.get_context_parallel_group()
        ranks, rank = group.size(), group.rank()
        keys, values = (_AllGather.apply(x, group) if ranks > 1 else x[None] for x in (key, value))
        bounds = (packed_seq_params.cu_seqlens_q // ranks).tolist()
        outputs = []
        for start, stop in pairwise(bounds):
            positions = [zigzag_positions(stop - start, r, ranks) for r in range(ranks)]
            visible = positions[rank][:, None] >= torch.cat(positions)[None]
            q, k, v = (
                x.transpose(0, 1)[None]  # [1, heads, tokens, d]
                for x in (query[start:stop], keys[:, start:stop].flatten(0, 1), values[:, start:stop].flatten(0, 1))
            )
            output = F.scaled_dot_product_attention(
                q, k, v, attn_mask=visible, scale=self.softmax_scale, enable_gqa=True
            )
            outputs.append(output[0].transpose(0, 1))
        return torch.cat(outputs).flatten(1)
