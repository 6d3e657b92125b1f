"""avg@k, cons@k, pass@k and their intervals on hand-worked cases, by enumeration, and by their properties."""

import logging
from argparse import Namespace
from enum import Enum
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slime_fipo.recipes import evaluation
from slime_fipo.recipes.evaluation import avg_at_k, bootstrap_interval, cons_at_k, evaluate, pass_at_k

verdicts = st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=8)


@pytest.mark.parametrize(
    ("answers", "correct", "expected"),
    [
        (["7", "7", "3"], [1, 1, 0], 1.0),
        (["7", "3", "3"], [1, 0, 0], 0.0),
        (["7", "3"], [1, 0], 0.5),  # a tie: one of the two is drawn
        (["7", "7", "3", "3", "5", "5"], [1, 1, 0, 0, 0, 0], 1 / 3),
        (["[INVALID]", "[INVALID]", "7"], [0, 0, 1], 1.0),  # no answer, no vote
        (["[INVALID]", None, ""], [0, 0, 0], 0.0),
        (["7"], [1], 1.0),
    ],
)
def test_cons_hand_worked(answers, correct, expected):
    assert cons_at_k(answers, correct) == pytest.approx(expected)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.just(0)), min_size=1, max_size=9), st.randoms())
def test_cons_does_not_depend_on_the_order(votes, random):
    answers = [answer for answer, _ in votes]
    correct = [float(answer == "a") for answer in answers]
    value = cons_at_k(answers, correct)
    order = list(range(len(answers)))
    random.shuffle(order)
    assert cons_at_k([answers[i] for i in order], [correct[i] for i in order]) == value
    share = correct.count(1.0) / len(correct)
    assert value == 1.0 or share <= 0.5, "an absolute majority decides"


@given(verdicts, st.integers(1, 8))
def test_pass_is_the_share_of_subsets_with_a_right_answer(correct, k):
    if k > len(correct):
        with pytest.raises(ValueError, match=f"pass@{k} cannot be estimated from {len(correct)} samples"):
            pass_at_k(correct, k)
        return
    subsets = list(combinations(correct, k))
    assert pass_at_k(correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@given(verdicts)
def test_pass_grows_with_k_from_the_average_to_any(correct):
    values = [pass_at_k(correct, k) for k in range(1, len(correct) + 1)]
    assert values == sorted(values)
    assert values[0] == pytest.approx(avg_at_k(correct))
    assert values[-1] == float(any(correct))


def test_estimates_from_nothing_are_refused():
    with pytest.raises(ValueError, match="at least one sample"):
        avg_at_k([])
    with pytest.raises(ValueError, match="at least one"):
        cons_at_k([], [])
    with pytest.raises(ValueError, match="as many answers"):
        cons_at_k(["1"], [1, 0])
    with pytest.raises(ValueError, match="pass@0"):
        pass_at_k([1], 0)
    with pytest.raises(ValueError, match="at least one problem"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match="at least one problem"):
        evaluate([])


def test_interval_of_one_problem_or_equal_ones_is_a_point():
    assert bootstrap_interval([0.3]) == pytest.approx((0.3, 0.3))
    assert bootstrap_interval([0.25] * 30) == pytest.approx((0.25, 0.25))


def test_interval_hand_worked_and_repeatable():
    # Two problems, one solved: a resample has mean 0, 0.5 or 1 with probability 1/4, 1/2, 1/4.
    assert bootstrap_interval([0.0, 1.0], confidence=0.4) == pytest.approx((0.5, 0.5))
    assert bootstrap_interval([0.0, 1.0], confidence=0.9) == pytest.approx((0.0, 1.0))
    values = np.linspace(0, 1, 30)
    assert bootstrap_interval(values) == bootstrap_interval(values)


def test_interval_covers_the_mean_about_as_often_as_it_says():
    random = np.random.default_rng(1)
    covered = 0
    for trial in range(300):
        low, high = bootstrap_interval(random.random(30), resamples=400, seed=trial)
        covered += low <= 0.5 <= high
    assert 0.88 <= covered / 300 <= 0.98


def test_a_benchmark_of_two_problems():
    metrics = evaluate([(["1", "1", "2", "3"], [1, 1, 0, 0]), (["4", "5", "6", "6"], [0, 0, 1, 1])])
    assert metrics["avg@4"] == pytest.approx(0.5)
    assert metrics["cons@4"] == pytest.approx(1.0)
    assert metrics["pass@2"] == pytest.approx(1 - 1 / 6)
    assert metrics["pass@4"] == 1.0
    assert set(metrics) == {
        f"{name}{end}" for name in ("avg@4", "cons@4", "pass@2", "pass@4") for end in ("", "_low", "_high")
    }


def test_problems_with_fewer_samples_bound_k():
    metrics = evaluate([(["1"] * 6, [1] * 6), (["1"] * 3, [0] * 3)])
    assert "avg@6" in metrics
    assert sorted(name for name in metrics if name.startswith("pass@") and "_" not in name) == ["pass@2", "pass@3"]
    assert not any(name.startswith("pass@") for name in evaluate([(["1"], [1])]))


class Status(Enum):
    """The part of slime's ``Sample.Status`` that matters."""

    COMPLETED = "completed"
    ABORTED = "aborted"


def sample(index: int, reward, status: Status = Status.COMPLETED) -> SimpleNamespace:
    return SimpleNamespace(index=index, reward=reward, status=status)


@pytest.fixture
def logged(monkeypatch) -> list[dict]:
    metrics = []
    monkeypatch.setattr(evaluation.tracking, "log", lambda args, rollout_id, values, step_key: metrics.append(values))
    evaluation._warn_of_no_accuracy.cache_clear()
    return metrics


ARGS = Namespace(n_samples_per_eval_prompt=2, eval_datasets=None)
RIGHT, WRONG = {"acc": 1.0, "pred": "7"}, {"acc": 0.0, "pred": "8"}


@pytest.mark.parametrize("reward", [1.0, {"score": 1.0}, None, {"acc": "yes"}, {"acc": None}])
def test_a_benchmark_without_accuracy_is_left_out_with_one_warning(reward, logged, caplog):
    data = {
        "gpqa": {"samples": [sample(i, reward) for i in range(4)]},
        "aime": {"samples": [sample(i, RIGHT) for i in range(4)]},
    }
    with caplog.at_level(logging.WARNING):
        assert evaluation.log_eval_rollout_data(0, ARGS, data) is False
        assert evaluation.log_eval_rollout_data(5, ARGS, data) is False
    assert [record.getMessage().partition(" have no")[0] for record in caplog.records] == ["the rewards of gpqa"]
    assert [metrics["eval/aime/avg@2"] for metrics in logged] == [1.0, 1.0]
    assert not any("gpqa" in name for metrics in logged for name in metrics)


def test_aborted_responses_are_left_out_and_said_to_be_so(logged, caplog):
    data = {
        "aime": {"samples": [sample(0, RIGHT), sample(1, None, Status.ABORTED), sample(2, WRONG), sample(3, RIGHT)]},
        "gone": {"samples": [sample(0, None, Status.ABORTED)]},
    }
    with caplog.at_level(logging.WARNING):
        evaluation.log_eval_rollout_data(0, ARGS, data)
    assert [record.getMessage() for record in caplog.records] == [
        f"1 responses of {name} were aborted by the engine and have no reward; its metrics leave them out"
        for name in ("aime", "gone")
    ]
    (metrics,) = logged
    assert metrics["eval/aime/avg@2"] == pytest.approx((1.0 + 0.5) / 2)
    assert not any("gone" in name for name in metrics)


def vote(logged: list[dict], *answers: tuple[object, float]) -> float:
    """cons@k of one problem."""
    samples = [sample(i, {"acc": accuracy, "pred": answer}) for i, (answer, accuracy) in enumerate(answers)]
    args = Namespace(n_samples_per_eval_prompt=len(answers), eval_datasets=None)
    evaluation.log_eval_rollout_data(0, args, {"aime": {"samples": samples}})
    return logged[-1][f"eval/aime/cons@{len(answers)}"]


def test_spellings_of_one_integer_vote_together(logged):
    assert vote(logged, ("034", 1), ("34", 1), ("$34$", 1), ("35", 0), ("35", 0)) == 1.0
    assert vote(logged, ("34", 1), ("34", 1), ("035", 0), ("35.0", 0), ("\\boxed{35}", 0)) == 0.0
    assert vote(logged, ("x + 1", 0), (" x + 1", 0), ("34", 1)) == 0.0


@pytest.mark.parametrize("answer", [["7"], {"x": 7}, 7, 7.5, np.array([7, 8]), b"7"])
def test_answers_of_any_kind_vote(answer, logged):
    assert vote(logged, (answer, 1), (answer, 1), ("8", 0)) == 1.0


def test_shares_of_verdicts(logged):
    rewards = [{**RIGHT, "second_look": 1.0, "unread": 0.0}, {**WRONG, "second_look": 0.0, "unread": 1.0}, RIGHT, RIGHT]
    evaluation.log_eval_rollout_data(0, ARGS, {"aime": {"samples": [sample(i, r) for i, r in enumerate(rewards)]}})
    assert logged[-1]["eval/aime/second_look_frac"] == 0.5
    assert logged[-1]["eval/aime/unread_frac"] == 0.5
