"""The user's model, small: what transformers computes with it beside the architecture written out, and bad folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from slime_fipo.errors import UserError
from slime_fipo.rehearsal.small_model import shrink_checkpoint
from slime_fipo.rehearsal.verdict import MOST_DIFFERENCE

from ..scripts.bash import flags, model_args
from ..scripts.published import PUBLISHED
from .families import write_checkpoint

transformers = pytest.importorskip("transformers", reason="pip install 'slime-fipo[slime]'")

MODELS = Path(__file__).resolve().parents[2] / "scripts" / "models"
# Tied and untied embeddings, QKV bias and QK norm, a rope base of 1e4, and a head size that is not hidden / heads.
DENSE = ("qwen2.5-1.5B", "qwen2.5-math-7B", "qwen2.5-32B", "qwen3-4B", "qwen3-32B")
# What a reference can leave out or have otherwise, and the models that have it.
PIECES = {
    "QKV bias": ("qwen2.5-1.5B", "qwen2.5-math-7B", "qwen2.5-32B"),
    "QK norm": ("qwen3-4B", "qwen3-32B"),
    "embeddings": DENSE,
    "rope": DENSE,
    "grouped queries": DENSE,
    "norm weights": DENSE,
    "epsilon": DENSE,
}
VOCABULARY = 2048
TOKENS = torch.randint(VOCABULARY, (48,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def shrunk(tmp_path_factory):
    """Model name -> what was made of a checkpoint of its shape, once; the weights are not kept."""
    made = {}

    def make(model: str):
        if model not in made:
            folder = tmp_path_factory.mktemp(model)
            made[model] = shrink_checkpoint(write_checkpoint(folder / "source", model), folder / "small")
            (folder / "small" / "model.safetensors").unlink()
        return made[model]

    return make


@pytest.fixture(scope="module")
def computing(tmp_path_factory):
    """Model name -> its small checkpoint with weights in float64 and a small vocabulary, made once."""
    made = {}

    def make(model: str) -> Path:
        if model not in made:
            folder = tmp_path_factory.mktemp(model)
            source = write_checkpoint(folder / "source", model)
            edit(source, lambda config: config.update(vocab_size=VOCABULARY))
            made[model] = shrink_checkpoint(source, folder / "small", torch.float64).folder
        return made[model]

    return make


def reference(folder: Path, tokens: torch.Tensor, without: str = "") -> torch.Tensor:
    """Logits [T, vocabulary] of a dense Qwen2 or Qwen3, from its files, with one piece taken away or swapped."""
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    size, groups, heads = config["head_dim"], config["num_key_value_heads"], config["num_attention_heads"]
    base = 500.0 if without == "rope" else config["rope_theta"]
    epsilon = 1e-2 if without == "epsilon" else config["rms_norm_eps"]

    def norm(x, name):
        weight = weights[name] if without != "norm weights" else torch.ones_like(weights[name])
        return weight * x / (x.pow(2).mean(-1, keepdim=True) + epsilon).sqrt()

    def linear(x, name):
        y = x @ weights[f"{name}.weight"].T
        return y if without == "QKV bias" else y + weights.get(f"{name}.bias", 0)

    def rotated(x):  # [heads, T, size]
        angles = torch.arange(len(tokens))[:, None] * base ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
        cos, sin = angles.cos(), angles.sin()
        a, b = x[..., : size // 2], x[..., size // 2 :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    x = weights["model.embed_tokens.weight"][tokens]
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        h = norm(x, f"{block}.input_layernorm.weight")
        q, k, v = (
            linear(h, f"{block}.self_attn.{name}_proj").view(len(tokens), -1, size).transpose(0, 1) for name in "qkv"
        )
        if config["model_type"] == "qwen3" and without != "QK norm":
            q, k = (norm(y, f"{block}.self_attn.{name}_norm.weight") for name, y in (("q", q), ("k", k)))
        q, k = rotated(q), rotated(k)
        if without == "grouped queries":  # each query head with another group's keys and values
            k, v = (y.repeat(heads // groups, 1, 1) for y in (k, v))
        else:
            k, v = (y.repeat_interleave(heads // groups, 0) for y in (k, v))
        scores = (q @ k.transpose(1, 2) / size**0.5).masked_fill(
            torch.ones(len(tokens), len(tokens), dtype=torch.bool).triu(1), -torch.inf
        )
        attention = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = x + linear(attention, f"{block}.self_attn.o_proj")
        h = norm(x, f"{block}.post_attention_layernorm.weight")
        gate, up = (linear(h, f"{block}.mlp.{name}_proj") for name in ("gate", "up"))
        x = x + linear(F.silu(gate) * up, f"{block}.mlp.down_proj")
    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    output = weights[head].flip(0) if without == "embeddings" else weights[head]
    return norm(x, "model.norm.weight") @ output.T


def logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        return model(tokens[None]).logits[0]


@pytest.mark.parametrize("model", DENSE)
def test_transformers_computes_the_familys_architecture_with_it(computing, model):
    folder = computing(model)
    # transformers' rotary angles are in float32
    torch.testing.assert_close(logits(folder, TOKENS), reference(folder, TOKENS), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("piece", "model"), [(piece, model) for piece, models in PIECES.items() for model in models])
def test_every_piece_of_the_architecture_shows(computing, piece, model):
    """What the rehearsal tells a wrong MODEL_ARGS by: log-probs that differ by more than bfloat16 makes them."""
    folder = computing(model)
    right, wrong = (reference(folder, TOKENS, without).log_softmax(-1) for without in ("", piece))
    assert (right - wrong).abs().mean() > MOST_DIFFERENCE


@pytest.mark.parametrize("model", PUBLISHED)
def test_what_a_family_is_known_by_stays(shrunk, model):
    small = shrunk(model)
    before, config = PUBLISHED[model], json.loads((small.folder / "config.json").read_text())
    assert config["model_type"] == ("qwen2" if model.startswith("qwen2.5") else "qwen3")
    assert (small.stand_in is not None) == model.startswith("qwen3.5-")
    assert config["vocab_size"] == before.vocabulary
    assert config["tie_word_embeddings"] == before.tied
    assert config["rope_theta"] == before.rope_base
    assert config["rms_norm_eps"] == before.eps
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    assert heads > groups == 2  # grouped, also on two tensor-parallel ranks
    has_own_head_size = before.head_dim * before.heads != before.hidden
    assert (config["head_dim"] * heads != config["hidden_size"]) == has_own_head_size


@pytest.mark.parametrize("model", PUBLISHED)
def test_every_size_in_model_args_is_replaced(shrunk, model):
    """The flags that describe a size, which would contradict the small model's."""
    small = shrunk(model)
    config = json.loads((small.folder / "config.json").read_text())
    given = flags(model_args(MODELS / f"{model}.sh"))
    sizes = {
        "--num-layers": "num_hidden_layers",
        "--hidden-size": "hidden_size",
        "--ffn-hidden-size": "intermediate_size",
        "--num-attention-heads": "num_attention_heads",
        "--num-query-groups": "num_key_value_heads",
        "--kv-channels": "head_dim",
    }
    assert small.flags == {flag: str(config[name]) for flag, name in sizes.items()}
    left = given.keys() - small.flags.keys() - set(small.removed_flags)
    numbers = {flag for flag in left if given[flag] and given[flag][0].replace("e-", "").isdigit()}
    assert numbers == {"--vocab-size", "--norm-epsilon", "--rotary-base"}


def test_what_was_changed_is_told(shrunk):
    rows = {what: (old, new) for what, old, new in shrunk("qwen3-32B").rows}
    assert rows["layers"] == ("64", "2")
    assert rows["hidden size"] == ("5120", "64")
    assert rows["head size"] == ("128", "32")
    assert "family" not in rows
    rows = {what: (old, new) for what, old, new in shrunk("qwen3.5-9B").rows}
    assert rows["family"][0] == "qwen3_5"
    assert rows["family"][1].startswith("qwen3: ")


def test_tokenizer_and_chat_template_are_the_sources(tmp_path, shrunk):
    source = write_checkpoint(tmp_path / "source", "qwen3-4B")
    folder = shrunk("qwen3-4B").folder
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1 = ?"}]
    theirs, ours = (transformers.AutoTokenizer.from_pretrained(f) for f in (source, folder))
    assert theirs.apply_chat_template(messages, tokenize=False) == ours.apply_chat_template(messages, tokenize=False)
    assert theirs("Answer: 34 π").input_ids == ours("Answer: 34 π").input_ids
    assert len(theirs("Answer").input_ids) < len("Answer")  # merges are read


def test_a_head_size_that_the_configuration_leaves_to_its_family(tmp_path):
    source = write_checkpoint(tmp_path / "source", "qwen3-32B")
    edit(source, lambda config: config.pop("head_dim"))  # transformers then takes 128, which is not 5120 / 64
    edit(source, lambda config: config.update(vocab_size=VOCABULARY))
    small = shrink_checkpoint(source, tmp_path / "small", torch.float64)
    assert small.flags["--kv-channels"] == "32"
    torch.testing.assert_close(logits(small.folder, TOKENS), reference(small.folder, TOKENS), rtol=0, atol=1e-4)


def test_one_that_is_there_is_replaced(tmp_path):
    source = write_checkpoint(tmp_path / "source", "qwen3-4B")
    folder = tmp_path / "small"
    shrink_checkpoint(source, folder)
    (folder / "left.safetensors").touch()
    shrink_checkpoint(source, folder)
    assert not (folder / "left.safetensors").exists()
    assert [each.name for each in tmp_path.iterdir() if each.name not in ("source", "small")] == []


# -- what cannot be made small --


def edit(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def no_config(folder):
    (folder / "config.json").unlink()


def no_json(folder):
    (folder / "config.json").write_text('{"model_type": ')


def no_object(folder):
    (folder / "config.json").write_text("[]")


def no_family(folder):
    edit(folder, lambda config: config.pop("model_type"))


def experts(folder):
    edit(folder, lambda config: config.update(model_type="qwen3_moe", num_experts=128))


def multimodal(folder):
    edit(folder, lambda config: config.update(model_type="qwen2_5_vl", vision_config={}))


def layers_in_words(folder):
    edit(folder, lambda config: config.update(num_hidden_layers="many"))


def no_tokenizer(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


def broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")


def small_vocabulary(folder):
    edit(folder, lambda config: config.update(vocab_size=300))


BAD = {
    no_config: "has no config.json; download the model there",
    no_json: "config.json is no JSON object with a model_type; download it again",
    no_object: "config.json is no JSON object with a model_type",
    no_family: "config.json is no JSON object with a model_type",
    experts: "of the family qwen3_moe (it has experts), which a rehearsal cannot make small; rehearse with a model of",
    multimodal: "of the family qwen2_5_vl (it is multimodal)",
    layers_in_words: "transformers cannot read its config.json",
    no_tokenizer: "has no tokenizer (tokenizer.json, vocab.json, tokenizer.model); download its tokenizer files there",
    broken_tokenizer: "its tokenizer cannot be read",
    small_vocabulary: "and config.json a vocab_size of 300; take both from the same model",
}


@pytest.mark.parametrize(("damage", "message"), BAD.items(), ids=[damage.__name__ for damage in BAD])
def test_what_cannot_be_made_small_names_the_flag(tmp_path, damage, message):
    source = write_checkpoint(tmp_path / "source", "qwen3-4B")
    damage(source)
    before = sorted(file.name for file in source.iterdir())
    with pytest.raises(UserError) as caught:
        shrink_checkpoint(source, tmp_path / "small")
    assert str(caught.value).startswith(f"--hf-checkpoint {source}")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "small").exists()
    assert sorted(file.name for file in source.iterdir()) == before
