"""The demo without slime: the exported model and its tokenizer, the curves read from TensorBoard, the reward."""

import argparse
import asyncio
import enum
import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.tensorboard import SummaryWriter

from slime_fipo.local.arguments import parse_arguments
from slime_fipo.local.checkpoint import save_checkpoint, state_tensors
from slime_fipo.local.data import Alphabet
from slime_fipo.local.model import build_model, initialize_megatron, packed_logits
from slime_fipo.local.task import ALPHABET
from slime_fipo.rehearsal.demo_reward import sums_reward

SMALL = "--num-layers 2 --hidden-size 24 --ffn-hidden-size 40 --num-attention-heads 6 --num-query-groups 2"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A random model of the embedded engine's, and what Hugging Face loads of its export."""
    transformers = pytest.importorskip("transformers", reason="pip install 'slime-fipo[slime]'")
    from slime_fipo.rehearsal.qwen3 import export

    folder = tmp_path_factory.mktemp("export")
    args = parse_arguments([*SMALL.split(), "--kv-channels", "8", "--rotary-base", "5000"])
    initialize_megatron(torch.device("cpu"), 1)
    model = build_model(args, Alphabet(args.alphabet).size, 64, torch.device("cpu"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # norms' weights start at 1, which hides a mix-up
    optimizer = torch.optim.AdamW(model.parameters())
    save_checkpoint(folder / "checkpoints" / "rollouts_0.safetensors", state_tensors(model, optimizer), {})
    export(folder / "checkpoints" / "rollouts_0.safetensors", folder / "hf", args, torch.float32)
    theirs = transformers.Qwen3ForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    return model, theirs, transformers.AutoTokenizer.from_pretrained(folder / "hf")


def test_the_exported_model_computes_the_same(exported):
    ours, theirs, _ = exported
    tokens = torch.randint(14, (20,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, actual = packed_logits(ours, [tokens])[0], theirs(tokens[None]).logits[0]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@given(text=st.text(ALPHABET))
def test_the_tokenizer_is_the_alphabets(exported, text):
    _, _, tokenizer = exported
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokens == Alphabet(ALPHABET).encode(text)
    assert tokenizer.decode(tokens) == text


def test_a_character_outside_the_alphabet_is_an_error(exported):
    _, _, tokenizer = exported
    with pytest.raises(Exception, match="UNK"):
        tokenizer("1+x=")


Status = enum.Enum("Status", "COMPLETED TRUNCATED")


@pytest.mark.parametrize(
    ("response", "status", "right"),
    [
        ("+2=2+3=0;0<end>", Status.COMPLETED, 1.0),
        ("0<end>", Status.COMPLETED, 1.0),
        ("0", Status.COMPLETED, 1.0),
        ("+2=2;1<end>", Status.COMPLETED, 0.0),
        ("0;<end>", Status.COMPLETED, 0.0),
        ("00<end>", Status.COMPLETED, 0.0),
        ("+2=2+3=0;0", Status.TRUNCATED, 0.0),
        ("", Status.COMPLETED, 0.0),
    ],
)
def test_the_reward_reads_what_follows_the_last_separator(response, status, right):
    sample = SimpleNamespace(response=response, status=status, label="0")
    assert asyncio.run(sums_reward(argparse.Namespace(), sample)) == right


def test_curves_count_rollouts_and_average_their_steps(tmp_path):
    from slime_fipo.rehearsal.demo import embedded_curves, slime_curves

    with SummaryWriter(tmp_path / "a") as writer:
        for step, value in enumerate([0.0, 0.25, 0.5, 1.0]):
            writer.add_scalar("train/fipo/influence_deviation", value, step)
            writer.add_scalar("train/train_rollout_logprob_abs_diff", value, step)
    with SummaryWriter(tmp_path / "b") as writer:
        for step in (0, 1, 3):
            writer.add_scalar("eval/heldout", step / 4, step)
    curves = slime_curves(tmp_path, steps_per_rollout=2)
    assert curves["deviation"] == [(0, 0.125), (1, 0.75)]
    assert curves["engine_difference"] == [(0, 0.0), (1, 0.5)]
    assert curves["heldout"] == [(0, 0.0), (2, 0.25), (4, 0.75)]
    assert curves["mismatch_clip"] == []

    rows = [{"eval/step": 0, "eval/heldout": 0.5}, {"rollout/step": 0, "fipo/influence_deviation": 0.25}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    curves = embedded_curves(tmp_path / "metrics.jsonl")
    assert curves["heldout"] == [(0, 0.5)] and curves["deviation"] == [(0, 0.25)] and curves["accuracy"] == []
