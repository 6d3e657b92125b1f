"""Our group filter in slime's own sampling loop, on three versions: rollouts end, and train on varied groups only."""

from __future__ import annotations

import importlib.util
import json

import pytest

from .conftest import python


@pytest.fixture(scope="module")
def rollouts(slime, tmp_path_factory) -> dict:
    for package in ("aiohttp", "pylatexenc", "sglang", "sglang_router"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"slime's rollout needs {package}; make test-slime installs it")
    out = tmp_path_factory.mktemp("rollout") / "out.json"
    run = python(["-m", "tests.slime.rollout_rig", out], slime)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(out.read_text())


def most_drawn(rollouts: dict) -> int:
    """A rollout without usable groups: those that are dropped in a row, those kept, and what is drawn at once."""
    return rollouts["most"] + rollouts["prompts"] + 2 * rollouts["drawn_at_once"]


@pytest.mark.parametrize("name", ["ordinary", "recovered", "ordinary again"])
def test_an_ordinary_rollout_is_unaffected(rollouts, name):
    rollout = rollouts[name]
    assert rollout["warnings"] == []
    assert rollout["raw_rewards"] == [1.0, 0.0] * rollouts["prompts"], "every group varies"
    assert rollout["trained_tokens"] == rollouts["tokens"]
    assert rollout["largest_advantage"] > 0.5
    usable = 3 if "ordinary" in name else 1  # one group in so many
    assert rollout["drawn"] <= usable * rollouts["prompts"] + rollouts["drawn_at_once"]


def test_a_rollout_in_which_nothing_is_read_ends_and_says_why(rollouts):
    rollout = rollouts["unread"]
    assert rollouts["most"] <= rollout["drawn"] <= most_drawn(rollouts)
    assert rollout["groups"] == rollouts["prompts"]
    (message,) = rollout["warnings"]
    assert f"dropped {rollouts['most']} groups in a row" in message
    assert "In 100% of their 512 responses no integer was read" in message or "In 99% of their 512" in message
    assert "another form of answer" in message and "Therefore the final result is $\\\\boxed{34}$" in message
    assert rollout["shares"] == {"second_look_frac": 0.0, "unread_frac": 1.0}
    assert rollout["metrics"]["rollout/dynamic_filter/drop_all_wrong"] > rollouts["most"] / 2


def test_until_a_group_varies_rollouts_go_on_without_more_warnings(rollouts):
    rollout = rollouts["still unread"]
    assert rollout["drawn"] == rollouts["drawn_at_once"]
    assert rollout["warnings"] == []


def test_a_rollout_in_which_everything_is_right_ends_and_says_why(rollouts):
    rollout = rollouts["all right"]
    assert rollouts["most"] <= rollout["drawn"] <= most_drawn(rollouts)
    (message,) = rollout["warnings"]
    assert "all_right" in message and "too hard or too easy" in message
    assert rollout["shares"]["second_look_frac"] == 1.0


@pytest.mark.parametrize("name", ["unread", "still unread", "all right"])
def test_nothing_is_trained_on_groups_without_advantage(rollouts, name):
    assert rollouts[name]["trained_tokens"] == 0


def test_removed_samples_have_no_gradient(rollouts):
    assert len(rollouts["gradients"]) == 4
    assert {name: values for name, values in rollouts["gradients"].items() if values != [0.0, 0.0]} == {}
