"""The embedded engine's model as a Hugging Face Qwen3 checkpoint with a tokenizer of its alphabet.

slime and SGLang load what this writes. The architecture is Qwen3's already (``local/model.py``); only Megatron's fused
weights are taken apart.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from ..local.checkpoint import read_checkpoint
from ..local.data import END, Alphabet

END_TEXT = "<end>"
MAX_POSITIONS = 1024


def export(checkpoint: Path, folder: Path, args: argparse.Namespace, dtype: torch.dtype) -> None:
    """Write the checkpoint file of a ``slime-fipo local`` run as a Qwen3 with its tokenizer, in ``folder``.

    Args:
        args: the namespace of that run; its model flags and alphabet are read.
        dtype: of the weights written. slime trains in bfloat16.

    Raises:
        ValueError: the checkpoint is damaged.
        OSError: the folder cannot be written; nothing half-written is left under its name.
    """
    weights = {
        name.removeprefix("model."): tensor
        for name, tensor in read_checkpoint(checkpoint).tensors.items()
        if name.startswith("model.")
    }
    model = Qwen3ForCausalLM(_config(args)).float()
    model.load_state_dict(hugging_face_weights(weights, args))
    temporary = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    model.to(dtype).save_pretrained(temporary)
    _tokenizer(Alphabet(args.alphabet)).save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def model_flags(args: argparse.Namespace) -> list[str]:
    """slime's ``MODEL_ARGS`` for the exported checkpoint."""
    flags = {
        "--num-layers": args.num_layers,
        "--hidden-size": args.hidden_size,
        "--ffn-hidden-size": args.ffn_hidden_size,
        "--num-attention-heads": args.num_attention_heads,
        "--num-query-groups": args.num_query_groups,
        "--kv-channels": args.kv_channels,
        "--rotary-base": args.rotary_base,
        "--norm-epsilon": "1e-6",
        "--normalization": "RMSNorm",
        "--seq-length": MAX_POSITIONS,
        "--max-position-embeddings": MAX_POSITIONS,
        "--vocab-size": Alphabet(args.alphabet).size,
        # Megatron pads a vocabulary to a multiple of this times TP; the padding would take part in the softmax, and
        # SGLang's has none: with 14 tokens padded to 128 the log-probs differ by 0.15 a token.
        "--make-vocab-size-divisible-by": 1,
    }
    switches = ["--swiglu", "--disable-bias-linear", "--qk-layernorm", "--group-query-attention"]
    return [*switches, "--use-rotary-position-embeddings", *(str(part) for pair in flags.items() for part in pair)]


def _config(args: argparse.Namespace) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=Alphabet(args.alphabet).size,
        hidden_size=args.hidden_size,
        intermediate_size=args.ffn_hidden_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.num_attention_heads,
        num_key_value_heads=args.num_query_groups,
        head_dim=args.kv_channels,
        max_position_embeddings=MAX_POSITIONS,
        rms_norm_eps=1e-6,
        rope_theta=float(args.rotary_base),
        tie_word_embeddings=True,
        eos_token_id=END,
        pad_token_id=END,
        bos_token_id=None,
    )


def _tokenizer(alphabet: Alphabet) -> PreTrainedTokenizerFast:
    """One token per character. A character outside the alphabet raises; it is not taken for another token."""
    vocabulary = {END_TEXT: END, **{c: alphabet.encode(c)[0] for c in alphabet.characters}}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_TEXT, pad_token=END_TEXT)


def hugging_face_weights(weights: dict[str, torch.Tensor], args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Megatron-Core's names and fused matrices -> Hugging Face's."""
    embedding = weights["embedding.word_embeddings.weight"]
    exported = {
        "model.embed_tokens.weight": embedding,
        "lm_head.weight": embedding,
        "model.norm.weight": weights["decoder.final_layernorm.weight"],
    }
    groups, queries = args.num_query_groups, args.num_attention_heads // args.num_query_groups
    for layer in range(args.num_layers):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        # Of each group: its query heads, then its key head, then its value head.
        heads = weights[ours + "self_attention.linear_qkv.weight"]
        heads = heads.view(groups, queries + 2, args.kv_channels, args.hidden_size)
        gate, up = weights[ours + "mlp.linear_fc1.weight"].chunk(2)
        exported |= {
            theirs + "self_attn.q_proj.weight": heads[:, :-2].flatten(0, 2),
            theirs + "self_attn.k_proj.weight": heads[:, -2].flatten(0, 1),
            theirs + "self_attn.v_proj.weight": heads[:, -1].flatten(0, 1),
            theirs + "self_attn.o_proj.weight": weights[ours + "self_attention.linear_proj.weight"],
            theirs + "self_attn.q_norm.weight": weights[ours + "self_attention.q_layernorm.weight"],
            theirs + "self_attn.k_norm.weight": weights[ours + "self_attention.k_layernorm.weight"],
            theirs + "mlp.gate_proj.weight": gate,
            theirs + "mlp.up_proj.weight": up,
            theirs + "mlp.down_proj.weight": weights[ours + "mlp.linear_fc2.weight"],
            theirs + "input_layernorm.weight": weights[ours + "input_layernorm.weight"],
            theirs + "post_attention_layernorm.weight": weights[ours + "pre_mlp_layernorm.weight"],
        }
    return exported
