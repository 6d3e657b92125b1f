"""Checkpoints of each family's shape without weights: the published model's ``config.json``, and a small tokenizer.

The tokenizer is a real one, byte-level with a few merges, a chat template and the family's special tokens. It has a few
hundred tokens of the configuration's vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ..scripts.published import PUBLISHED, hugging_face_config, model_of

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{%- for message in messages %}"
    "{%- if message.role not in ('system', 'user', 'assistant', 'tool') %}"
    "{{- raise_exception('no role ' + message.role) }}{%- endif %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
TRAINED_ON = "Solve the problem step by step. The last line must be Answer: the number of primes below the other one."
MERGES = 64
# Qwen3.5's delta-net layers: heads of their values, and of their keys; the model cards'.
VALUE_HEADS = {"0.8B": 16, "2B": 16, "4B": 32, "9B": 32, "27B": 48}
KEY_HEADS = 16


def write_checkpoint(folder: Path, model: str, positions: int = 32768) -> Path:
    """Write a checkpoint of the shape of a published model (a name in ``tests/scripts/published.py``); ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    config = architecture(model, positions, tokenizer.token_to_id("<|endoftext|>"))
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": list(SPECIAL[1:]),
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def checkpoint_of(folder: Path, positions: int = 32768) -> Path:
    """:func:`write_checkpoint` for the model that the folder is named after."""
    return write_checkpoint(folder, model_of(folder.name), positions)


def architecture(model: str, positions: int, eos: int) -> dict:
    """``config.json`` of a published model, with all that loading it takes."""
    config = hugging_face_config(model, positions)
    text = config.get("text_config", config) | {"hidden_act": "silu", "attention_dropout": 0.0, "eos_token_id": eos}
    if config["model_type"] == "qwen2":
        return text | {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False, "torch_dtype": "bfloat16"}
    text["attention_bias"] = False
    if config["model_type"] == "qwen3":
        return text | {"architectures": ["Qwen3ForCausalLM"], "torch_dtype": "bfloat16"}
    text |= {
        "layer_types": [
            "full_attention" if layer % 4 == 3 else "linear_attention" for layer in range(PUBLISHED[model].layers)
        ],
        "full_attention_interval": 4,
        "attn_output_gate": True,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": KEY_HEADS,
        "linear_num_value_heads": VALUE_HEADS[model.rpartition("-")[2]],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": PUBLISHED[model].rope_base,
            "partial_rotary_factor": 0.25,
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
        },
        "dtype": "bfloat16",
    }
    return {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "text_config": text,
        "tie_word_embeddings": text["tie_word_embeddings"],
        "vision_config": {"model_type": "qwen3_5_vision", "out_hidden_size": text["hidden_size"]},
    }


def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + len(SPECIAL) + MERGES,
        initial_alphabet=alphabet,
        special_tokens=list(SPECIAL),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TRAINED_ON], trainer)
    return tokenizer
