"""Response-length-weighted mean advantage: hand-worked, and against the sum over tokens that defines it."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slime_fipo.recipes.rollout_metrics import group_advantages, length_weighted_mean_advantage


def test_hand_worked():
    # A right answer of 30 tokens and a wrong one of 10: (30 · 1 − 10 · 1) / 40.
    assert length_weighted_mean_advantage([1.0, -1.0], [30, 10]) == pytest.approx(0.5)
    assert length_weighted_mean_advantage([1.0, -1.0], [10, 10]) == 0.0
    assert math.isnan(length_weighted_mean_advantage([1.0], [0]))


@given(st.lists(st.tuples(st.floats(-3, 3), st.integers(0, 50)), min_size=1, max_size=8))
def test_equals_the_mean_over_tokens(responses):
    tokens = [advantage for advantage, length in responses for _ in range(length)]
    if tokens:
        value = length_weighted_mean_advantage(*zip(*responses, strict=True))
        assert value == pytest.approx(np.mean(tokens), abs=1e-9)


def test_group_advantages_hand_worked():
    rewards, groups = [1, -1, -1, -1, 5, 5, 2], [0, 0, 0, 0, 1, 1, 2]
    advantages = group_advantages(rewards, groups)
    assert advantages[:4] == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-5)  # deviation 1 with n − 1
    assert advantages[4:] == pytest.approx([0, 0, 0])
    assert group_advantages(rewards, groups, normalise_std=False)[:4] == pytest.approx([1.5, -0.5, -0.5, -0.5])
    assert group_advantages([0, 4], [0, 0], normalise_std=False) == pytest.approx([-2, 2])
