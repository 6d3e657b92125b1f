"""The soft overlong penalty on hand-worked cases and by its properties; the hook itself is tested in tests/slime."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slime_fipo.recipes.reward import soft_overlong_penalty

# The paper's 32B run: M = 20,480, C = 4,096.
HAND_WORKED = [
    (0, 0.0),
    (16384, 0.0),  # n = M - C
    (16385, -1 / 4096),
    (17408, -0.25),
    (18432, -0.5),
    (20479, -4095 / 4096),
    (20480, -1.0),  # n = M
    (20481, -1.0),
    (10**9, -1.0),
]


@pytest.mark.parametrize(("length", "penalty"), HAND_WORKED)
def test_hand_worked(length, penalty):
    assert soft_overlong_penalty(length, 20480, 4096) == pytest.approx(penalty, abs=1e-12)


lengths = st.integers(1, 100_000)


@given(longest=lengths, share=st.floats(0.001, 1.0), factor=st.floats(0.0, 5.0), n=st.integers(0, 200_000))
def test_bounded_monotone_and_continuous(longest, share, factor, n):
    buffer = max(1, int(longest * share))
    here, next_token = (soft_overlong_penalty(i, longest, buffer, factor) for i in (n, n + 1))
    assert -factor <= here <= 0
    assert next_token <= here
    assert here - next_token <= factor / buffer + 1e-9, "one token costs at most factor / C: no jump"
    if n <= longest - buffer:
        assert here == 0
    if n >= longest:
        assert here == -factor


def test_no_buffer_no_penalty():
    assert soft_overlong_penalty(10**6, 20480, 0) == 0.0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((1, 100, 101), "--overlong-buffer-len is 101"),
        ((1, 100, -1), "--overlong-buffer-len is -1"),
        ((1, 100, 10, -0.5), "--overlong-penalty-factor is -0.5"),
    ],
)
def test_settings_out_of_range_are_refused(arguments, named):
    with pytest.raises(ValueError, match=named):
        soft_overlong_penalty(*arguments)
