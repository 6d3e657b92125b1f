"""The policy: a small Qwen3-shaped ``GPTModel`` of Megatron-Core, and the one-process setup it needs.

RMSNorm, SwiGLU, grouped-query attention, QK-norm and RoPE come from Megatron-Core; only the core attention is ours,
because Megatron-Core's unfused one cannot decode from a KV cache without an attention mask. Nothing here knows about
sampling, rewards or losses.
"""

from __future__ import annotations

import argparse
import warnings

import torch
import torch.distributed
import torch.nn.functional as F

from ..errors import UserError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # megatron-core warns once per GPU package that is absent
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig


class ScaledDotProductAttention(torch.nn.Module):
    """Core attention over ``torch.nn.functional.scaled_dot_product_attention``.

    Causal over a whole sequence (training, prefill); a single query (decoding from the KV cache) attends to all keys.
    """

    def __init__(self, config, layer_number, attn_mask_type, attention_type, softmax_scale=None, **_):
        super().__init__()
        self.softmax_scale = softmax_scale

    def forward(self, query, key, value, attention_mask, **_):
        """query [sq, b, heads, d], key and value [sk, b, groups, d] -> [sq, b, heads * d]; sq is sk or 1."""
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=query.size(2) > 1, scale=self.softmax_scale, enable_gqa=True
        )
        return out.permute(2, 0, 1, 3).flatten(2)


def initialize_megatron(device: torch.device, num_threads: int) -> None:
    """Set up torch and Megatron-Core's parallel state for one process; may be called again."""
    torch.set_num_threads(num_threads)
    if device.type == "cpu":
        # Megatron-Core allocates its KV cache on torch.cuda.current_device(), which raises where there is no GPU.
        torch.cuda.current_device = lambda: device
    else:
        torch.cuda.set_device(device)
    if not torch.distributed.is_initialized():
        # Megatron-Core wants process groups; with one process nothing is ever sent, so gloo serves on a GPU too.
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()


def build_model(args: argparse.Namespace, vocab_size: int, max_sequence_length: int, device: torch.device) -> GPTModel:
    """The untrained policy in float32; its initial weights depend on the model flags and ``args.seed`` alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about Megatron-Core's own default of a deprecated option
        config = TransformerConfig(
            num_layers=args.num_layers,
            hidden_size=args.hidden_size,
            ffn_hidden_size=args.ffn_hidden_size,
            num_attention_heads=args.num_attention_heads,
            num_query_groups=args.num_query_groups,
            kv_channels=args.kv_channels,
            normalization="RMSNorm",
            layernorm_epsilon=1e-6,
            qk_layernorm=True,
            gated_linear_unit=True,
            activation_func=F.silu,
            add_bias_linear=False,
            init_method_std=args.init_method_std,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            bias_dropout_fusion=False,
            use_cpu_initialization=True,  # the same weights whatever the device
        )
    spec = get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm")
    spec.submodules.self_attention.submodules.core_attention = ScaledDotProductAttention
    torch.manual_seed(args.seed)
    model = GPTModel(
        config,
        spec,
        vocab_size=vocab_size,
        max_sequence_length=max_sequence_length,
        share_embeddings_and_output_weights=True,
        position_embedding_type="rope",
        rotary_base=args.rotary_base,
    )
    return model.to(device)


def diverged(sign: str) -> UserError:
    """What is raised where numbers are no longer finite."""
    return UserError(
        f"training diverged ({sign}); choose another --save and a smaller --lr, --demo-lr or --init-method-std"
    )


def packed_logits(model: GPTModel, tokens: list[torch.Tensor]) -> torch.Tensor:
    """Logits of ragged sequences, packed one after the other as slime packs them.

    Args:
        tokens: the sequences, each a LongTensor [length]. They are padded on the right, where causal attention
            cannot see it, so no sequence influences another.

    Returns:
        [1, sum of lengths, vocabulary], with gradient.
    """
    padded = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
    lengths = torch.tensor([len(t) for t in tokens], device=padded.device)
    positions = torch.arange(padded.size(1), device=padded.device)
    logits = model(padded, positions.expand_as(padded), None)
    return logits[positions < lengths[:, None]].unsqueeze(0)
