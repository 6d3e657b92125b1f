"""Sampling: recorded log-probs against a full forward pass, ragged batches, ends, rewards, dynamic sampling."""

import pytest
import torch

from slime_fipo.local.data import END, PromptSource, Record
from slime_fipo.local.model import packed_logits
from slime_fipo.local.random_streams import seeded_generator
from slime_fipo.local.rollout import collect_rollout, generate, reward, sample_responses
from slime_fipo.local.train_data import group_advantages, make_rollout_batch, response_log_probs

from .rig import CPU, tiny_args, tiny_model

PROMPTS = ["1+2=", "3", "4+0+1+1=", "2+2=", "0+0+0+0+0+0+0=", "1"]


@pytest.fixture(scope="module")
def model_and_alphabet():
    return tiny_model(tiny_args("--init-method-std", "0.2"))


def _full_forward_log_probs(model, prompt, response, temperature):
    tokens = torch.tensor(prompt + response)
    batch = {"tokens": [tokens], "total_lengths": [len(tokens)], "response_lengths": [len(response)]}
    with torch.no_grad():
        return response_log_probs(packed_logits(model, [tokens]), batch, temperature)[0]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
def test_sampled_log_probs_equal_recomputed_ones(model_and_alphabet, temperature):
    """Each response alone, without cache: this also shows that nothing of its batch leaked into it."""
    model, alphabet = model_and_alphabet
    prompts = [alphabet.encode(p) for p in PROMPTS for _ in range(4)]
    outputs = generate(model, prompts, 9, temperature, seeded_generator(CPU, 1))
    assert len({len(response) for response, _ in outputs}) > 2
    for prompt, (response, log_probs) in zip(prompts, outputs, strict=True):
        recomputed = _full_forward_log_probs(model, prompt, response, temperature)
        torch.testing.assert_close(torch.tensor(log_probs), recomputed, atol=2e-5, rtol=0)


def test_packed_logits_do_not_leak_between_sequences(model_and_alphabet):
    model, alphabet = model_and_alphabet
    tokens = [torch.tensor(alphabet.encode(p)) for p in PROMPTS]
    together = packed_logits(model, tokens)[0].split([len(t) for t in tokens])
    for alone, part in zip(tokens, together, strict=True):
        torch.testing.assert_close(packed_logits(model, [alone])[0], part, atol=2e-5, rtol=0)


def test_responses_end_where_they_should(model_and_alphabet):
    model, alphabet = model_and_alphabet
    prompts = [alphabet.encode(p) for p in PROMPTS * 20]
    outputs = generate(model, prompts, 5, 1.0, seeded_generator(CPU, 2))
    ended = [END in response for response, _ in outputs]
    assert any(ended) and not all(ended)
    for response, log_probs in outputs:
        assert len(response) == len(log_probs) <= 5
        assert END not in response[:-1]
        assert response[-1] == END or len(response) == 5


def test_sampling_follows_the_distribution(model_and_alphabet):
    """First tokens of many responses to one prompt against the model's own probabilities."""
    model, alphabet = model_and_alphabet
    prompt = alphabet.encode("1+2=")
    outputs = generate(model, [prompt] * 4000, 1, 1.5, seeded_generator(CPU, 3))
    counts = torch.bincount(torch.tensor([response[0] for response, _ in outputs]), minlength=alphabet.size)
    with torch.no_grad():
        expected = (packed_logits(model, [torch.tensor(prompt)])[0, -1] / 1.5).softmax(-1)
    deviation = (counts / 4000 - expected).abs() / (expected * (1 - expected) / 4000).sqrt().clamp_min(1e-3)
    assert deviation.max() < 4.5


def test_a_generator_s_key_decides_the_responses(model_and_alphabet):
    model, alphabet = model_and_alphabet
    prompts = [alphabet.encode(p) for p in PROMPTS]
    first, same, other = (
        generate(model, prompts, 9, 1.0, seeded_generator(CPU, *key)) for key in ((1, 2), (1, 2), (2, 1))
    )
    assert first == same != other


@pytest.mark.parametrize(
    ("response", "truncated", "expected"),
    [("4", False, 1), ("+1=4;4", False, 1), ("4", True, 0), ("4;3", False, 0), ("3;1;4", False, 1), ("", False, 0)],
)
def test_reward(response, truncated, expected):
    assert reward(response, "4", truncated, ";") == expected


def test_dynamic_sampling_trains_on_groups_of_unequal_reward(model_and_alphabet):
    model, alphabet = model_and_alphabet
    args = tiny_args("--rollout-max-response-len", "1", "--max-sampling-rounds", "50", "--n-samples-per-prompt", "8")
    # One token that must be END for the reward: the empty label is hit often, «11» never.
    records = [Record("1+2=", ""), Record("3=", "11")]
    source = PromptSource(records, False, 0)
    groups, metrics = collect_rollout(args, model, alphabet, source, seeded_generator(CPU, 1))
    assert len(groups) == args.rollout_batch_size and metrics["rollout/groups_filled_up"] == 0
    assert all(len({sample.reward for sample in group}) == 2 and group[0].prompt == "1+2=" for group in groups)
    assert metrics["rollout/groups_of_equal_reward"] >= metrics["rollout/groups_sampled"] / 2
    assert source.position == metrics["rollout/groups_sampled"]

    args.dynamic_sampling = False
    groups, metrics = collect_rollout(args, model, alphabet, PromptSource(records, False, 0), seeded_generator(CPU, 1))
    assert [group[0].prompt for group in groups] == ["1+2=", "3="] * 2
    assert metrics["rollout/groups_sampled"] == 4 and metrics["rollout/groups_of_equal_reward"] == 0


def test_a_rollout_without_any_reward_difference_ends(model_and_alphabet):
    model, alphabet = model_and_alphabet
    args = tiny_args("--max-sampling-rounds", "3", "--rollout-max-response-len", "2")
    source = PromptSource([Record("1=", "123456789")], False, 0)
    groups, metrics = collect_rollout(args, model, alphabet, source, seeded_generator(CPU, 1))
    assert metrics["rollout/groups_filled_up"] == len(groups) == args.rollout_batch_size
    assert metrics["rollout/groups_sampled"] == 3 * args.rollout_batch_size
    assert group_advantages(args, groups) == [0.0] * 16


def test_rollout_batch_has_slime_s_shapes(model_and_alphabet):
    model, alphabet = model_and_alphabet
    args = tiny_args()
    records = [Record(prompt, "1") for prompt in PROMPTS]
    groups = sample_responses(args, model, alphabet, records, 4, seeded_generator(CPU, 1))
    batch = make_rollout_batch(args, model, groups, CPU, 0)
    assert {len(values) for values in batch.values()} == {24}
    for i, length in enumerate(batch["response_lengths"]):
        assert len(batch["tokens"][i]) == batch["total_lengths"][i]
        for name in ("loss_masks", "rollout_log_probs", "log_probs", "advantages"):
            assert batch[name][i].shape == (length,)
        torch.testing.assert_close(batch["log_probs"][i], batch["rollout_log_probs"][i], atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], [1.5, -0.5, -0.5, -0.5]),
        (["--disable-grpo-std-normalization"], [0.75, -0.25, -0.25, -0.25]),
        (["--disable-rewards-normalization"], [1, 0, 0, 0]),
    ],
)
def test_advantages(model_and_alphabet, flags, expected):
    model, alphabet = model_and_alphabet
    args = tiny_args(*flags)
    [group] = sample_responses(args, model, alphabet, [Record("1=", "1")], 4, seeded_generator(CPU, 1))
    for sample, value in zip(group, (1.0, 0.0, 0.0, 0.0), strict=True):
        sample.reward = value
    assert group_advantages(args, [group]) == pytest.approx(expected, abs=1e-5)
