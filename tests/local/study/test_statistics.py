"""The statistics: coverage, the exact test against all flips written out, and what must not depend on units."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slime_fipo.local.study.statistics import mean_interval, paired_effect

DRAWS = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "uniform": lambda rng, shape: rng.uniform(-1, 1, shape),
    "heavy tails": lambda rng, shape: rng.standard_t(3, shape),
    "two values": lambda rng, shape: rng.choice([-1.0, 1.0], shape) + rng.normal(0, 0.1, shape),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize("seeds", [6, 12])
def test_coverage_of_a_thousand_studies(draw, seeds):
    true = 0.37
    low, high = mean_interval(true + draw(np.random.default_rng(0), (1000, seeds)))
    assert 0.92 <= np.mean((low <= true) & (true <= high)) <= 0.97
    assert np.mean((low <= 0) & (high >= 0)) < 0.92  # it is not wide enough to hold anything


def test_the_effects_interval_is_the_one_whose_coverage_was_measured():
    values = np.random.default_rng(1).normal(size=12)
    effect = paired_effect(values)
    low, high = mean_interval(values)
    assert (effect.low, effect.high) == (low, high)
    half = 2.200985 * values.std(ddof=1) / math.sqrt(12)  # Student's t, 11 degrees of freedom, 97.5%
    assert effect.half_width == pytest.approx(half, rel=1e-5)
    assert effect.bootstrap_low == pytest.approx(low, abs=half / 2) and effect.bootstrap_low != low
    assert effect.bootstrap_high == pytest.approx(high, abs=half / 2)


@given(st.lists(st.integers(-9, 9), min_size=2, max_size=8))
@settings(max_examples=50)
def test_sign_flips_against_all_of_them(differences):
    flipped = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((-1, 1), repeat=len(differences))
    ]
    expected = sum(total >= abs(sum(differences)) for total in flipped) / len(flipped)
    assert paired_effect(differences).p_value == pytest.approx(expected)


@given(
    st.lists(st.floats(-1, 1).filter(lambda x: x == 0 or abs(x) > 1e-3), min_size=2, max_size=12),
    st.sampled_from([0.001, 0.5, 100.0]),
)
@settings(max_examples=50)
def test_units_and_direction(differences, unit):
    effect, scaled = paired_effect(differences), paired_effect([-unit * d for d in differences])
    assert effect.low <= effect.mean <= effect.high
    assert scaled.mean == pytest.approx(-unit * effect.mean)
    assert (scaled.low, scaled.high) == pytest.approx((-unit * effect.high, -unit * effect.low), abs=1e-9)
    assert scaled.p_value == pytest.approx(effect.p_value)


def test_known_answers():
    same = paired_effect([0.25] * 12)
    assert (same.mean, same.low, same.high, same.bootstrap_low, same.half_width) == (0.25, 0.25, 0.25, 0.25, 0)
    assert same.p_value == pytest.approx(2 / 2**12) and same.excludes_zero
    nothing = paired_effect([0.0] * 5)
    assert nothing.p_value == 1 and not nothing.excludes_zero
    one = paired_effect([0.5])
    assert one.mean == 0.5 and math.isnan(one.low) and math.isnan(one.p_value) and not one.excludes_zero


@pytest.mark.parametrize("differences", [[], [1.0, math.nan], [[1.0, 2.0]]])
def test_what_is_no_difference(differences):
    with pytest.raises(ValueError, match="at least one finite number"):
        paired_effect(differences)


def test_many_seeds_are_drawn_from_not_written_out():
    values = np.random.default_rng(2).normal(0.5, 1, 40)
    assert 0 < paired_effect(values).p_value < 0.05
