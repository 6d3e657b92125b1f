"""What stands around the loss, in the whole loop: reward, filter, evaluation, trackers, records, several turns."""

import base64
import gzip
import json
import re
from dataclasses import fields

import numpy as np
import pytest
import torch

from slime_fipo.algorithm import FipoConfig, fipo_weights
from slime_fipo.recipes.reward import soft_overlong_penalty
from slime_fipo.recipes.rollout_metrics import group_advantages, length_weighted_mean_advantage
from slime_fipo.records import Fate, TokenRecord, read_records
from slime_fipo.report.command import write_report

from .conftest import STEPS_PER_ROLLOUT, Run
from .hooks import FIRST_TURN, TOOL_SAYS, kind_of_group
from .test_loop import DISK, FUTURE_KL, SGLANG_LOG_PROBS

ROLLOUTS, PER_GROUP, GROUPS, MAX_LENGTH, OVERLONG_BUFFER = 3, 4, 4, 24, 12
TIS_CLIP = 2.0
RECORD = ("--fipo-record", "{folder}/records", "--fipo-record-interval", "1")
DUMP = ("--save-debug-rollout-data", "{folder}/rollout_{{rollout_id}}.pt")


def dumped(run: Run, rollout: int) -> list[dict]:
    """slime's own dump of a rollout's samples."""
    return torch.load(run.folder / f"rollout_{rollout}.pt", weights_only=True)["samples"]


def step(record: TokenRecord) -> int:
    return record.header.rollout_id * STEPS_PER_ROLLOUT + record.header.step_id


def token_losses(record: TokenRecord, tis_clip: float | None = None) -> np.ndarray:
    """The objective of a response's tokens [T], from what was recorded of them; ε as in ``loop.py``."""
    ratio, advantages = np.exp(record.shift.clip(-20, 20)), record.advantages
    losses = np.maximum(-advantages * ratio, -advantages * ratio.clip(0.8, 1.28))
    dual_clipped = np.minimum(losses, -advantages * record.header.config["dual_clip_c"])
    losses = np.where(advantages < 0, dual_clipped, losses) * record.influence
    losses[(record.fate & Fate.DROPPED) != 0] = 0
    return losses if tis_clip is None else losses * np.exp(record.mismatch).clip(0, tis_clip)


def whole_records(run: Run) -> list[TokenRecord]:
    """Records of every response at every step of the run."""
    found = read_records(run.folder / "records")
    assert found.missing == []
    assert len(found.records) == ROLLOUTS * GROUPS * PER_GROUP
    return found.records


@pytest.fixture(scope="module")
def recipe(loop):
    """The launch scripts' recipe, and truncated importance sampling on the trainer's log-probs."""
    heldout = loop.folder / "heldout.jsonl"
    heldout.write_text("".join(f'{{"prompt": "{i}+1+0=", "label": "{i + 1}"}}\n' for i in range(3)))
    return loop(
        "recipe",
        2,
        loop.slime / "train.py",
        *("--use-tis", "--tis-clip", TIS_CLIP, "--calculate-per-token-loss"),
        *("--custom-rm-path", "slime_fipo.recipes.reward.dapo_math_reward"),
        *("--reward-key", "score", "--eval-reward-key", "acc"),
        *("--overlong-buffer-len", OVERLONG_BUFFER, "--overlong-penalty-factor", 1),
        *("--dynamic-sampling-filter-path", "slime_fipo.recipes.filters.accuracy_varies"),
        *("--rollout-sample-hook-path", "tests.whole.hooks.answer"),
        *("--custom-rollout-log-function-path", "slime_fipo.recipes.rollout_metrics.log_rollout_data"),
        *("--custom-eval-rollout-log-function-path", "slime_fipo.recipes.evaluation.log_eval_rollout_data"),
        *("--eval-interval", 2, "--eval-prompt-data", "sums", heldout, "--n-samples-per-eval-prompt", PER_GROUP),
        *("--use-wandb", "--wandb-project", "whole", "--wandb-group", "recipe", "--wandb-dir", "{folder}"),
        *RECORD,
        *DUMP,
        WANDB_MODE="offline",
    )


def test_groups_that_vary_are_kept_and_no_others(recipe):
    """Of four prompts in a row the first is answered right four times, the second never."""
    numbers = [{sample["group_index"] for sample in dumped(recipe, rollout)} for rollout in range(ROLLOUTS)]
    assert [len(kept) for kept in numbers] == [GROUPS] * ROLLOUTS
    kept = set().union(*numbers)
    assert len(kept) == ROLLOUTS * GROUPS and {kind_of_group(number) for number in kept} == {"mixed"}
    for reason in ("all_right", "all_wrong"):
        assert set(recipe.steps(f"rollout/dynamic_filter/drop_{reason}").values()) <= {1, 2}


def test_rewards_are_the_verdict_and_the_overlong_penalty(recipe):
    penalties = set()
    for sample in (sample for rollout in range(ROLLOUTS) for sample in dumped(recipe, rollout)):
        right, reward = sample["index"] % 2, sample["reward"]
        penalty = soft_overlong_penalty(sample["response_length"], MAX_LENGTH, OVERLONG_BUFFER)
        assert (reward["acc"], reward["unread"]) == (right, 1 - right)
        assert reward["score"] == (1 if right else -1) + penalty
        penalties.add(penalty)
    assert 0 in penalties and len(penalties) > 2


def test_advantages_are_the_scores_of_the_group(recipe):
    for rollout in range(ROLLOUTS):
        samples = dumped(recipe, rollout)
        scores = [sample["reward"]["score"] for sample in samples]
        expected = group_advantages(scores, [sample["group_index"] for sample in samples])
        records = [record for record in whole_records(recipe) if record.header.rollout_id == rollout]
        for record in records:
            np.testing.assert_allclose(record.advantages, expected[record.position], atol=1e-5)
        weighted = length_weighted_mean_advantage(expected, [sample["response_length"] for sample in samples])
        logged = recipe.steps("rollout/length_weighted_mean_advantage")[rollout]
        assert logged == pytest.approx(weighted, abs=1e-5)


def test_the_loss_is_the_token_mean_with_fipos_weights_and_tis(recipe):
    """From the records of every step; the sample mean and a loss without either weight are others."""
    assert set(recipe.first_steps(FUTURE_KL)) == {0.0}
    logged = recipe.steps("train/pg_loss")
    records = whole_records(recipe)
    without_tis, sample_mean = [], []
    for number, loss in logged.items():
        of_step = [record for record in records if step(record) == number]
        losses = np.concatenate([token_losses(record, TIS_CLIP) for record in of_step])
        assert loss == pytest.approx(losses.mean(), abs=1e-5)
        without_tis.append(abs(loss - np.concatenate([token_losses(record) for record in of_step]).mean()))
        sample_mean.append(abs(loss - np.mean([token_losses(record, TIS_CLIP).mean() for record in of_step])))
    # TIS weights differ from 1 by noise, which may cancel in one step's mean.
    assert max(without_tis) > 5e-5 and max(sample_mean) > 5e-5
    assert len(logged) == ROLLOUTS * STEPS_PER_ROLLOUT
    assert min(recipe.steps("train/tis").values()) > 0.9


def test_hooks_log_the_rollouts_and_evaluations(recipe):
    """Every second of four responses to each of three held-out prompts is right."""
    assert list(recipe.steps("rollout/unread_frac").values()) == [0.5] * ROLLOUTS
    assert set(recipe.steps("rollout/second_look_frac").values()) == {0.0}
    expected = {"avg@4": 1 / 2, "cons@4": 1.0, "pass@2": 5 / 6, "pass@4": 1.0, "unread_frac": 1 / 2}
    for name, value in expected.items():
        found = recipe.result["metrics"][f"eval/sums/{name}"]
        assert [v for _, v in found] == pytest.approx([value] * 2), name  # before training and after two rollouts
    assert [v for _, v in recipe.result["metrics"]["eval/sums"]] == pytest.approx([1 / 2] * 2)  # slime's own


def test_wandb_has_offline_what_tensorboard_has(recipe):
    wandb, tensorboard = recipe.result["wandb"], recipe.result["metrics"]
    names = {name for name in tensorboard if name.startswith(("train/", "rollout/", "eval/"))}
    assert {"train/fipo/future_kl", "train/fipo/influence_weight", "eval/sums/avg@4"} <= names
    assert names <= set(wandb)
    for name in (name for name in names if name.startswith("train/fipo/")):
        assert wandb[name] == pytest.approx([value for _, value in tensorboard[name]], rel=1e-6), name


def test_the_report_page_shows_the_recorded_responses(recipe, tmp_path):
    page, sentence = write_report([recipe.folder / "records"], tmp_path / "report.html")
    assert sentence.startswith("48 of 48 recorded responses")
    description, arrays = page_data(page.read_text(encoding="utf-8"))
    samples = [dumped(recipe, rollout) for rollout in range(ROLLOUTS)]
    texts, position = np.array(description["pieces"]["text"]), 0
    for response in description["responses"]:
        sample = samples[response["rollout"]][response["position"]]
        assert response["length"] == sample["response_length"]
        prompt = texts[arrays["prompts"][position : position + response["prompt"]]]
        assert "".join(prompt) == sample["prompt"]
        position += response["prompt"]
    np.testing.assert_array_equal(arrays["f"], np.concatenate([record.influence for record in whole_records(recipe)]))


def page_data(html: str) -> tuple[dict, dict[str, np.ndarray]]:
    """What a report's page holds: see ``slime_fipo/report/page.py``."""
    data = gzip.decompress(base64.b64decode(re.search(r'id="data">([^<]*)<', html)[1]))
    start = 4 + int.from_bytes(data[:4], "little")
    description = json.loads(data[4:start])
    arrays = {
        name: np.frombuffer(data, of["type"], of["length"], start + of["offset"])
        for name, of in description["arrays"].items()
    }
    return description, arrays


@pytest.fixture(scope="module")
def two_turns(loop):
    return loop(
        "two_turns",
        3,
        loop.slime / "train.py",
        *SGLANG_LOG_PROBS,
        *DISK,
        *("--actor-num-gpus-per-node", 2, "--context-parallel-size", 2),
        *("--custom-generate-function-path", "tests.whole.hooks.two_turns"),
        *("--fipo-decay-over", "trained_tokens"),
        *RECORD,
        *DUMP,
    )


def test_what_a_tool_said_is_not_trained_on(two_turns):
    for rollout in range(ROLLOUTS):
        for sample in dumped(two_turns, rollout):
            mask = sample["loss_mask"]
            hole = mask.index(0)
            assert mask == [1] * hole + [0] * len(TOOL_SAYS) + [1] * (len(mask) - hole - len(TOOL_SAYS))
            assert 1 <= hole <= FIRST_TURN and mask[-1] == 1
    samples = dumped(two_turns, 0)
    for record in whole_records(two_turns):
        if record.header.rollout_id == 0:
            assert record.loss_mask.tolist() == [bool(m) for m in samples[record.position]["loss_mask"]]


def test_future_kl_decays_over_trained_tokens_at_cp2(two_turns):
    """Weights of two ranks' records, put together, are those of one process on whole responses."""
    records = whole_records(two_turns)
    assert {record.header.cp_size for record in records} == {2}
    assert {record.header.config["decay_over"] for record in records} == {"trained_tokens"}
    shifts, advantages, masks, future_kl, influence = (
        torch.from_numpy(np.concatenate([getattr(record, name) for record in records]))
        for name in ("shift", "advantages", "loss_mask", "future_kl", "influence")
    )
    lengths = [len(record.tokens) for record in records]
    names = {field.name for field in fields(FipoConfig)}
    config = {name: value for name, value in records[0].header.config.items() if name in names}

    def reference(**changes):
        return fipo_weights(
            shifts.double(), torch.zeros_like(shifts).double(), advantages.double(), masks, lengths,
            FipoConfig(**{**config, **changes}),
        )  # fmt: skip

    expected = reference()
    torch.testing.assert_close(future_kl[masks].double(), expected.future_kl[masks], atol=1e-5, rtol=0)
    torch.testing.assert_close(influence[masks].double(), expected.weights[masks], atol=1e-5, rtol=0)
    over_positions = reference(decay_over="positions").future_kl
    assert (future_kl[masks] - over_positions[masks]).abs().max() > 1e-3


def test_the_loss_is_the_mean_of_responses_means(two_turns):
    logged = two_turns.steps("train/pg_loss")
    records = whole_records(two_turns)
    for number in logged:
        of_step = [record for record in records if step(record) == number]
        losses = [token_losses(record)[record.loss_mask] for record in of_step]
        assert logged[number] == pytest.approx(np.mean([each.mean() for each in losses]), abs=1e-5)
        assert abs(logged[number] - np.concatenate(losses).mean()) > 1e-5
    assert len(logged) == ROLLOUTS * STEPS_PER_ROLLOUT
