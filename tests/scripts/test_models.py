"""Each model script describes the published model: parameters counted here from its flags, and slime's own script."""

import os
from pathlib import Path

import pytest

from .bash import MODELS, flags, model_args

# Billions of parameters, as published, embeddings included.
PUBLISHED = {
    "qwen2.5-1.5B": 1.54,
    "qwen2.5-3B": 3.09,
    "qwen2.5-7B": 7.61,
    "qwen2.5-14B": 14.7,
    "qwen2.5-32B": 32.5,
    "qwen2.5-math-1.5B": 1.54,
    "qwen2.5-math-7B": 7.61,
    "qwen3-0.6B": 0.6,
    "qwen3-1.7B": 1.7,
    "qwen3-4B": 4.0,
    "qwen3-8B": 8.2,
    "qwen3-14B": 14.8,
    "qwen3-32B": 32.8,
    "qwen3.5-0.8B": 0.8,
    "qwen3.5-2B": 2.0,
    "qwen3.5-4B": 4.0,
    "qwen3.5-9B": 9.0,
    "qwen3.5-27B": 27.0,
}
# Qwen3.5's delta-net layers, three of every four, whose sizes are not among the flags: value heads (16 key heads and a
# head dimension of 128 in all), as the model cards say.
DELTA_NET_VALUE_HEADS = {"0.8B": 16, "2B": 16, "4B": 32, "9B": 32, "27B": 48}
# (script, flag): why it is not slime's.
EXCEPTIONS = {
    ("qwen2.5-1.5B", "--rotary-base"): "slime's has 10000, which is Qwen2.5-Math-1.5B's; the base model's is 1000000",
}


def parameters(words: list[str], delta_net_value_heads: int | None = None) -> float:
    """Every weight of a decoder with grouped-query attention, SwiGLU and RMSNorm, matrix by matrix."""
    given = flags(words)
    number = {name: int(values[0]) for name, values in given.items() if len(values) == 1 and values[0].isdigit()}
    layers, hidden, ffn = number["--num-layers"], number["--hidden-size"], number["--ffn-hidden-size"]
    heads, groups = number["--num-attention-heads"], number["--num-query-groups"]
    head = number.get("--kv-channels", hidden // heads)
    assert {"--swiglu", "--group-query-attention", "--disable-bias-linear"} <= given.keys()
    assert given["--normalization"] == ["RMSNorm"]

    query = hidden * heads * head * (2 if "--attention-output-gate" in given else 1)
    key_value = 2 * hidden * groups * head
    output = heads * head * hidden
    qkv_bias = (heads + 2 * groups) * head if "--add-qkv-bias" in given else 0
    qk_norm = 2 * head if "--qk-layernorm" in given else 0
    attention = query + key_value + output + qkv_bias + qk_norm
    if delta_net_value_heads:
        keys, values = 16 * 128, delta_net_value_heads * 128
        delta_net = hidden * (2 * keys + 3 * values)  # queries, keys, values, gate and output; small ones left out
        attention = attention / 4 + delta_net * 3 / 4
    mlp = 3 * hidden * ffn
    norms = 2 * hidden
    embedding = number["--vocab-size"] * hidden * (2 if "--untie-embeddings-and-output-weights" in given else 1)
    return layers * (attention + mlp + norms) + embedding + hidden


def test_there_is_a_script_for_every_model():
    assert {script.stem for script in MODELS} == PUBLISHED.keys()


@pytest.mark.parametrize("script", MODELS, ids=lambda s: s.stem)
def test_parameter_count_is_the_published_one(script):
    family, _, size = script.stem.partition("-")
    heads, tolerance = (DELTA_NET_VALUE_HEADS[size], 0.10) if family == "qwen3.5" else (None, 0.02)
    assert parameters(model_args(script), heads) / 1e9 == pytest.approx(PUBLISHED[script.stem], rel=tolerance)


def test_math_models_differ_from_the_base_models_in_the_rope_base_alone():
    for size in ("1.5B", "7B"):
        base, math = (
            flags(model_args(next(s for s in MODELS if s.stem == name)))
            for name in (f"qwen2.5-{size}", f"qwen2.5-math-{size}")
        )
        assert {name for name in base if base[name] != math[name]} == {"--rotary-base"}
        assert (base["--rotary-base"], math["--rotary-base"]) == (["1000000"], ["10000"])


@pytest.mark.slime
def test_equal_to_slimes_own_scripts():
    root = os.environ.get("SLIME_ROOT")
    if not root:
        pytest.skip("SLIME_ROOT is not set; git clone slime, then SLIME_ROOT=that/directory make test-slime")
    compared, differing = 0, set()
    for script in MODELS:
        theirs = Path(root) / "scripts" / "models" / script.name
        if theirs.exists():
            compared += 1
            ours, slimes = flags(model_args(script)), flags(model_args(theirs))
            names = {name for name in ours.keys() | slimes.keys() if _value(ours, name) != _value(slimes, name)}
            differing |= {(script.stem, name) for name in names}
    assert compared >= 14
    assert differing == EXCEPTIONS.keys()


def _value(given: dict, name: str):
    """Values as Megatron reads them: 1e-06 is 1e-6."""
    values = given.get(name)
    if name == "--norm-epsilon" and values:
        return float(values[0])
    return values
