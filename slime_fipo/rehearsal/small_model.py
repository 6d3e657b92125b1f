"""The user's model, small: same family, vocabulary and tokenizer, two narrow layers of random weights.

Reads a Hugging Face folder's ``config.json`` and tokenizer, never its weights or code. Megatron's architecture flags
(``--swiglu``, ``--qk-layernorm``, ``--rotary-base``, …) stay the user's own: against these weights a wrong one shows as
a difference between SGLang's and Megatron's log-probs.
"""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from ..errors import UserError
from .tokenizer import load_tokenizer

LAYERS, HIDDEN, FFN, GROUPS = 2, 64, 128, 2
SEED = 0
NORM_NOISE = 0.1  # norms' weights around 1: at exactly 1 a forgotten norm weight would not show

DENSE = ("qwen2", "qwen3")
# Families that cannot run without a GPU, for which a dense Qwen3 stands in: why, and the flags that are theirs alone.
# SGLang's Qwen3.5 on a CPU takes its layers from sgl_kernel's CPU build, which is not on PyPI, and slime's spec from
# flash-linear-attention and Transformer Engine, which are for GPUs.
STAND_IN_FOR = {
    "qwen3_5": (
        "gated delta-net layers need a GPU's kernels, in SGLang and in slime",
        ("--spec", "--attention-output-gate", "--use-gated-attention", "--apply-layernorm-1p", "--rotary-percent"),
    )
}
KEPT_BY_STAND_IN = (
    *("vocab_size", "hidden_act", "rms_norm_eps", "max_position_embeddings", "attention_bias", "head_dim"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json"),
)


@dataclass(frozen=True)
class SmallModel:
    """A small checkpoint and what goes with it.

    Attributes:
        folder: the Hugging Face checkpoint.
        flags: Megatron flag -> its value for the small model.
        removed_flags: flags of the source's family that the small model does not have.
        rows: what was changed: (what, from, to), for a table.
        stand_in: why the small model is of another family than the source; None where it is the same.
    """

    folder: Path
    flags: dict[str, str]
    removed_flags: tuple[str, ...]
    rows: list[tuple[str, str, str]]
    stand_in: str | None


@dataclass(frozen=True)
class _Shape:
    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    head: int


def shrink_checkpoint(source: Path, folder: Path, dtype: torch.dtype = torch.bfloat16) -> SmallModel:
    """Write a small model of ``source``'s family to ``folder``, replacing what is there.

    Args:
        source: ``--hf-checkpoint``; its ``config.json`` and tokenizer files are read.
        folder: gets the checkpoint, complete or not at all.
        dtype: of the weights written.

    Raises:
        UserError: ``source`` has no readable configuration or tokenizer, or is of a family that cannot be shrunk.
        OSError: ``folder`` cannot be written.
    """
    declared, config = _read_config(source)
    family, text = config.model_type, config.get_text_config()
    stand_in, removed_flags = STAND_IN_FOR.get(family, (None, ()))
    if stand_in:
        declared = _dense_qwen3(config)
    before, after = _shape(text), _small_shape(text)
    small = _small_config(declared, after, dtype)
    temporary = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    (temporary / "config.json").write_text(json.dumps(small, indent=2) + "\n", encoding="utf-8")
    _copy_tokenizer(source, temporary, text.vocab_size)
    _write_weights(temporary, dtype)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    rows = [("family", family, f"{declared['model_type']}: {stand_in}")] if stand_in else []
    rows += _rows(declared, before, after, dtype)
    return SmallModel(folder, _flags(after), removed_flags, rows, stand_in)


def _read_config(source: Path) -> tuple[dict, PretrainedConfig]:
    """``config.json`` as it is written, and as transformers reads it."""
    file = source / "config.json"
    if not file.is_file():
        raise UserError(f"--hf-checkpoint {source} has no config.json; download the model there, or correct the path")
    try:
        declared = json.loads(file.read_text(encoding="utf-8"))
        family = declared["model_type"]
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"--hf-checkpoint {source}: its config.json is no JSON object with a model_type; download it again"
        ) from None
    if family not in (*DENSE, *STAND_IN_FOR):
        raise UserError(
            f"--hf-checkpoint {source} is of the family {family}{_obstacle(declared)}, which a rehearsal cannot make"
            f" small; rehearse with a model of {', '.join([*DENSE[:-1], *STAND_IN_FOR])} or {DENSE[-1]}"
        )
    try:
        return declared, AutoConfig.from_pretrained(source, trust_remote_code=False, local_files_only=True)
    except Exception as problem:  # transformers' own checks raise many kinds
        raise UserError(
            f"--hf-checkpoint {source}: transformers cannot read its config.json ({_first_line(problem)}); correct it"
        ) from None


def _dense_qwen3(config: PretrainedConfig) -> dict:
    """A dense Qwen3's ``config.json`` with what the text model of ``config`` shares with it."""
    text = config.get_text_config()
    return {name: getattr(text, name) for name in KEPT_BY_STAND_IN} | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "rope_theta": text.rope_parameters["rope_theta"],
        "tie_word_embeddings": config.tie_word_embeddings or text.tie_word_embeddings,
    }


def _obstacle(declared: dict) -> str:
    text = declared.get("text_config", declared)
    if any(name in text for name in ("num_experts", "n_routed_experts", "num_local_experts", "moe_intermediate_size")):
        return " (it has experts)"
    return " (it is multimodal)" if {"vision_config", "audio_config"} & declared.keys() else ""


def _first_line(problem: Exception) -> str:
    return (str(problem).strip() or type(problem).__name__).splitlines()[0]


def _shape(text: PretrainedConfig) -> _Shape:
    heads = text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // heads
    return _Shape(
        text.num_hidden_layers, text.hidden_size, text.intermediate_size, heads, text.num_key_value_heads, head
    )


def _small_shape(text: PretrainedConfig) -> _Shape:
    """Grouped-query attention stays grouped, and a head size other than hidden / heads stays another one."""
    before = _shape(text)
    groups = min(before.groups, GROUPS)
    heads = groups * min(before.heads // before.groups, 2)
    head = HIDDEN // heads
    if before.head * before.heads != before.hidden:
        head = 32 if head == 16 else 16
    return _Shape(min(before.layers, LAYERS), HIDDEN, FFN, heads, groups, head)


def _small_config(declared: dict, shape: _Shape, dtype: torch.dtype) -> dict:
    """The user's own ``config.json`` with what has to shrink changed, and nothing else."""
    small = copy.deepcopy(declared)
    small |= {
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.groups,
        "head_dim": shape.head,  # where a configuration leaves it out, some families have a size of their own
    }
    if small.get("layer_types"):
        small["layer_types"] = small["layer_types"][: shape.layers]
    if small.get("max_window_layers"):
        small["max_window_layers"] = min(small["max_window_layers"], shape.layers)
    small.pop("quantization_config", None)
    small["dtype" if "dtype" in small else "torch_dtype"] = str(dtype).removeprefix("torch.")
    return small


def _copy_tokenizer(source: Path, folder: Path, vocabulary: int) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if (source / "additional_chat_templates").is_dir():
        shutil.copytree(source / "additional_chat_templates", folder / "additional_chat_templates")
    tokenizer = load_tokenizer(folder, source)
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= vocabulary:
        raise UserError(
            f"--hf-checkpoint {source}: its tokenizer has a token {largest}, and config.json a vocab_size of"
            f" {vocabulary}; take both from the same model"
        )


def _write_weights(folder: Path, dtype: torch.dtype) -> None:
    """Random weights for ``folder``'s configuration. The pad token's row is one of them: transformers would zero it,
    and RMSNorm's gradient at 0 is in the thousands."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    generator = torch.Generator().manual_seed(SEED)
    weights = {}
    for name, parameter in model.named_parameters():  # tied weights once
        draw = torch.randn(parameter.shape, generator=generator)
        is_norm = parameter.dim() == 1 and "norm" in name
        # 1 / sqrt(hidden): what a layer adds is then as large as what it reads, so that each one matters.
        weights[name] = (1 + NORM_NOISE * draw if is_norm else draw * HIDDEN**-0.5).to(dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _flags(shape: _Shape) -> dict[str, str]:
    flags = {
        "--num-layers": shape.layers,
        "--hidden-size": shape.hidden,
        "--ffn-hidden-size": shape.ffn,
        "--num-attention-heads": shape.heads,
        "--num-query-groups": shape.groups,
        "--kv-channels": shape.head,
    }
    return {name: str(value) for name, value in flags.items()}


def _rows(declared: dict, before: _Shape, after: _Shape, dtype: torch.dtype) -> list[tuple]:
    sizes = {
        "layers": (before.layers, after.layers),
        "hidden size": (before.hidden, after.hidden),
        "FFN size": (before.ffn, after.ffn),
        "attention heads": (before.heads, after.heads),
        "query groups": (before.groups, after.groups),
        "head size": (before.head, after.head),
    }
    rows = [(what, str(old), str(new)) for what, (old, new) in sizes.items() if old != new]
    if "quantization_config" in declared:
        method = str(declared["quantization_config"].get("quant_method", "yes"))
        rows.append(("quantization", method, "none"))
    rows.append(("weights", "the checkpoint's", f"random, {str(dtype).removeprefix('torch.')}"))
    return rows
