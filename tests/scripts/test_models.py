"""Each model script describes the published model: its shape, parameters counted here from its flags, and slime's own
script."""

import pytest

from .bash import MODELS, flags, model_args
from .published import PUBLISHED, Shape, model_of

NUMBERS = {
    "--num-layers",
    "--hidden-size",
    "--ffn-hidden-size",
    "--num-attention-heads",
    "--num-query-groups",
    "--kv-channels",
    "--vocab-size",
    "--rotary-base",
    "--norm-epsilon",
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
    assert parameters(model_args(script), heads) / 1e9 == pytest.approx(PUBLISHED[script.stem].billions, rel=tolerance)


@pytest.mark.parametrize("script", MODELS, ids=lambda s: s.stem)
def test_every_flag_is_the_published_models(script):
    given = flags(model_args(script))
    number = {name: float(values[0]) for name, values in given.items() if name in NUMBERS}
    heads = int(number["--num-attention-heads"])
    assert (
        Shape(
            billions=PUBLISHED[script.stem].billions,  # counted in a test of its own
            layers=number["--num-layers"],
            hidden=number["--hidden-size"],
            ffn=number["--ffn-hidden-size"],
            heads=heads,
            groups=number["--num-query-groups"],
            head_dim=number.get("--kv-channels", number["--hidden-size"] // heads),
            vocabulary=number["--vocab-size"],
            tied="--untie-embeddings-and-output-weights" not in given,
            rope_base=number["--rotary-base"],
            eps=number["--norm-epsilon"],
        )
        == PUBLISHED[script.stem]
    )
    family = script.stem.partition("-")[0]
    assert ("--add-qkv-bias" in given) == (family == "qwen2.5")
    assert ("--qk-layernorm" in given) == (family != "qwen2.5")
    for flag in ("--attention-output-gate", "--apply-layernorm-1p", "--spec"):
        assert (flag in given) == (family == "qwen3.5"), flag
    assert given.get("--rotary-percent", ["1.0"]) == (["0.25"] if family == "qwen3.5" else ["1.0"])


def test_a_folder_is_its_most_specific_model():
    assert model_of("Qwen2.5-Math-7B-32k") == "qwen2.5-math-7B"
    assert model_of("Qwen3.5-0.8B-Base") == "qwen3.5-0.8B"


def test_math_models_differ_from_the_base_models_in_the_rope_base_alone():
    for size in ("1.5B", "7B"):
        base, math = (
            flags(model_args(next(s for s in MODELS if s.stem == name)))
            for name in (f"qwen2.5-{size}", f"qwen2.5-math-{size}")
        )
        assert {name for name in base if base[name] != math[name]} == {"--rotary-base"}
        assert (base["--rotary-base"], math["--rotary-base"]) == (["1000000"], ["10000"])


@pytest.mark.slime
def test_equal_to_slimes_own_scripts(slime_root):
    compared, differing = 0, set()
    for script in MODELS:
        theirs = slime_root / "scripts" / "models" / script.name
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
