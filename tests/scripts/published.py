"""The published models, from their cards and Hugging Face configurations: what no flag under test has a say in."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    billions: float  # of parameters, embeddings included
    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    head_dim: int
    vocabulary: int
    tied: bool
    rope_base: float
    eps: float


PUBLISHED = {
    "qwen2.5-1.5B": Shape(1.54, 28, 1536, 8960, 12, 2, 128, 151936, True, 1e6, 1e-6),
    "qwen2.5-3B": Shape(3.09, 36, 2048, 11008, 16, 2, 128, 151936, True, 1e6, 1e-6),
    "qwen2.5-7B": Shape(7.61, 28, 3584, 18944, 28, 4, 128, 152064, False, 1e6, 1e-6),
    "qwen2.5-14B": Shape(14.7, 48, 5120, 13824, 40, 8, 128, 152064, False, 1e6, 1e-5),
    "qwen2.5-32B": Shape(32.5, 64, 5120, 27648, 40, 8, 128, 152064, False, 1e6, 1e-5),
    "qwen2.5-math-1.5B": Shape(1.54, 28, 1536, 8960, 12, 2, 128, 151936, True, 1e4, 1e-6),
    "qwen2.5-math-7B": Shape(7.61, 28, 3584, 18944, 28, 4, 128, 152064, False, 1e4, 1e-6),
    "qwen3-0.6B": Shape(0.6, 28, 1024, 3072, 16, 8, 128, 151936, True, 1e6, 1e-6),
    "qwen3-1.7B": Shape(1.7, 28, 2048, 6144, 16, 8, 128, 151936, True, 1e6, 1e-6),
    "qwen3-4B": Shape(4.0, 36, 2560, 9728, 32, 8, 128, 151936, True, 1e6, 1e-6),
    "qwen3-8B": Shape(8.2, 36, 4096, 12288, 32, 8, 128, 151936, False, 1e6, 1e-6),
    "qwen3-14B": Shape(14.8, 40, 5120, 17408, 40, 8, 128, 151936, False, 1e6, 1e-6),
    "qwen3-32B": Shape(32.8, 64, 5120, 25600, 64, 8, 128, 151936, False, 1e6, 1e-6),
    "qwen3.5-0.8B": Shape(0.8, 24, 1024, 3584, 8, 2, 256, 248320, True, 1e7, 1e-6),
    "qwen3.5-2B": Shape(2.0, 24, 2048, 6144, 8, 2, 256, 248320, True, 1e7, 1e-6),
    "qwen3.5-4B": Shape(4.0, 32, 2560, 9216, 16, 4, 256, 248320, True, 1e7, 1e-6),
    "qwen3.5-9B": Shape(9.0, 32, 4096, 12288, 16, 4, 256, 248320, False, 1e7, 1e-6),
    "qwen3.5-27B": Shape(27.0, 64, 5120, 17408, 24, 4, 256, 248320, False, 1e7, 1e-6),
}
MODEL_TYPES = {"qwen2.5": "qwen2", "qwen3": "qwen3", "qwen3.5": "qwen3_5"}


def model_of(folder: str) -> str:
    """The published model that a checkpoint's folder is named after: Qwen2.5-Math-7B-32k is qwen2.5-math-7B."""
    return max((name for name in PUBLISHED if folder.lower().startswith(name.lower())), key=len)


def hugging_face_config(model: str, positions: int) -> dict:
    """A ``config.json`` of that model, with the keys that slime and we read."""
    shape, model_type = PUBLISHED[model], MODEL_TYPES[model.partition("-")[0]]
    config = {
        "model_type": model_type,
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.groups,
        "vocab_size": shape.vocabulary,
        "rms_norm_eps": shape.eps,
        "rope_theta": shape.rope_base,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": positions,
    }
    if model_type != "qwen2":
        config["head_dim"] = shape.head_dim
    if model_type == "qwen3_5":  # the text model is inside
        config["rope_parameters"] = {"rope_theta": config.pop("rope_theta")}
        config = {"model_type": model_type, "text_config": {**config, "model_type": "qwen3_5_text"}}
    return config
