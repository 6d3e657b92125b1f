"""Reward, group filter, evaluation and rollout metric through the hooks of three slime versions, worked by hand."""

from __future__ import annotations

import importlib.util
import json

import pytest

from .conftest import python


@pytest.fixture(scope="module")
def results(slime, tmp_path_factory) -> dict:
    for package in ("wandb", "tensorboard", "pylatexenc", "aiohttp", "sglang"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"slime's reward hub needs {package}; make test-slime installs it")
    out = tmp_path_factory.mktemp("recipes") / "out.json"
    run = python(["-m", "tests.slime.recipe_rig", out], slime)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(out.read_text())


# M = 100, C = 40: free up to 60 tokens, full penalty from 100.
@pytest.mark.parametrize(
    ("name", "score", "acc", "penalty"),
    [
        ("short", 1.0, 1.0, 0.0),
        ("halfway", 0.5, 1.0, -0.5),
        ("full", 0.0, 1.0, -1.0),
        ("beyond", 0.0, 1.0, -1.0),
        ("wrong", -1.5, 0.0, -0.5),
        ("silent", -1.0, 0.0, 0.0),
    ],
)
def test_reward(results, name, score, acc, penalty):
    reward = results["rewards"][name]
    assert reward["score"] == pytest.approx(score)
    assert reward["acc"] == acc
    assert reward["overlong_penalty"] == pytest.approx(penalty)


def test_reward_beside_the_score(results):
    assert results["without_buffer"]["score"] == 1.0
    assert results["raw_reward"] == 1.0, "pass rates count rewards equal to 1"
    assert [reward["acc"] for reward in results["batched"]] == [1.0, 0.0]
    assert results["rewards"]["short"]["pred"] == "34"
    assert results["rewards"]["silent"]["pred"] == "[INVALID]"
    assert results["rewards"]["silent"]["unread"] == 1.0
    assert "is not an integer (sample 0)" in results["label_error"] and "--label-key" in results["label_error"]


def test_group_filter_is_blind_to_the_penalty(results):
    assert results["filter"] == {
        "mixed": [True, None],
        "all_right_other_lengths": [False, "all_right"],
        "all_wrong_other_lengths": [False, "all_wrong"],
        "mixed_equal_scores": [True, None],
        "aborted": [False, "aborted"],
    }
    assert "sample 7 has no 'acc'" in results["filter_error"]
    assert "256 groups in a row could not be used" in results["only_aborted"]


def test_evaluation(results):
    scalars = {name: values[-1] for name, values in results["scalars"].items()}
    assert scalars["eval/aime24/avg@4"] == pytest.approx(0.5)
    assert scalars["eval/aime24/cons@4"] == pytest.approx(0.5)  # the second problem's majority is wrong
    assert scalars["eval/aime24/pass@2"] == pytest.approx((1.0 + 0.5) / 2)
    assert scalars["eval/aime24/pass@4"] == pytest.approx(1.0)
    assert scalars["eval/aime24/avg@4_low"] == pytest.approx(0.25)
    assert scalars["eval/aime24/avg@4_high"] == pytest.approx(0.75)
    assert scalars["eval/aime24"] == pytest.approx(0.5), "slime's own metrics follow"


def test_rollout_metric(results):
    scalars = results["scalars"]
    # Group of four with scores 0.25, -1, -1, -1: advantages 1.5 and -0.5; the other group has none.
    expected = (1.5 * 90 - 0.5 * 30) / (90 + 30 + 60)
    assert scalars["rollout/length_weighted_mean_advantage"][-1] == pytest.approx(expected, rel=1e-4)
    assert scalars["rollout/second_look_frac"][-1] == pytest.approx(4 / 8)
    assert scalars["rollout/unread_frac"][-1] == 0.0
    assert scalars["rollout/removed_frac"][-1] == pytest.approx(1 / 8)
    assert "rollout/response_len/mean" in scalars, "slime's own metrics follow"
