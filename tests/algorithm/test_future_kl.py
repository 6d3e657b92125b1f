"""Every implementation of Future-KL against the float64 recurrence, over lengths, half-lives and masks."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad

from slime_fipo import future_kl

from . import oracle

IMPLS = ("chunked", "scan")
BLOCK_EDGES = (0, 1, 2, 3, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257)
DECAY_RATES = (0.5, 0.7, 1.0, 8.0, 32.0, 256.0, 4096.0)


def make_shift(seed, lengths, spikes=0, hole_share=0.0, sigma=0.05):
    rng = np.random.default_rng(seed)
    total = sum(lengths)
    shift = rng.normal(0, sigma, total)
    if total and spikes:
        shift[rng.integers(0, total, spikes)] = rng.choice([-20.0, 20.0], spikes)
    mask = rng.random(total) >= hole_share
    return (shift * mask).astype(np.float32), mask


def worst_error(result, expected):
    return np.abs(result.double().numpy() - expected).max(initial=0) / max(1e-3, np.abs(expected).max(initial=0))


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    lengths=st.lists(st.one_of(st.sampled_from(BLOCK_EDGES), st.integers(0, 400)), max_size=8),
    decay_rate=st.one_of(st.sampled_from(DECAY_RATES), st.floats(0.5, 4096)),
    spikes=st.integers(0, 5),
    hole_share=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    trained_only=st.booleans(),
    chunk_size=st.sampled_from([1, 7, 64, 128]),
)
def test_both_agree_with_the_recurrence(seed, lengths, decay_rate, spikes, hole_share, trained_only, chunk_size):
    shift, mask = make_shift(seed, lengths, spikes, hole_share)
    decay_mask = mask if trained_only else None
    expected = oracle.future_kl(shift, lengths, decay_rate, decay_mask)
    for impl in IMPLS:
        result = future_kl(
            torch.from_numpy(shift),
            lengths,
            decay_rate,
            decay_mask=None if decay_mask is None else torch.from_numpy(decay_mask),
            impl=impl,
            chunk_size=chunk_size,
        )
        assert result.dtype == torch.float32 and result.shape == (sum(lengths),)
        assert worst_error(result, expected) <= 1e-5, impl


@pytest.mark.parametrize("decay_rate", [0.5, 32.0, 4096.0])
@pytest.mark.parametrize("impl", IMPLS)
def test_long_responses(impl, decay_rate):
    lengths = [20480, 1, 0, 5000, 20480] if impl == "scan" else [20480, 1, 0, 777]
    shift, _ = make_shift(7, lengths, spikes=20)
    expected = oracle.future_kl(shift, lengths, decay_rate)
    result = future_kl(torch.from_numpy(shift), lengths, decay_rate, impl=impl, chunk_size=512)
    assert worst_error(result, expected) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("decay_rate", [5e-324, 1e-310, 1e-30, 1e300])
@pytest.mark.parametrize("impl", IMPLS)
def test_extreme_half_lives(impl, decay_rate, dtype):
    """At τ → 0 only tokens at no distance count, at τ → ∞ all do, and a mask may leave tokens at no distance."""
    lengths = [1, 0, 40, 129]
    shift, _ = make_shift(5, lengths, sigma=1.0)
    mask = np.random.default_rng(2).random(len(shift)) < 0.5
    for decay_mask in (None, mask):
        # From 1e-4 tokens down, 2^(−1/τ) is 0 in float64 too; the oracle is spared the overflow.
        expected = oracle.future_kl(shift, lengths, max(decay_rate, 1e-4), decay_mask)
        given_mask = None if decay_mask is None else torch.from_numpy(decay_mask)
        result = future_kl(torch.from_numpy(shift).to(dtype), lengths, decay_rate, decay_mask=given_mask, impl=impl)
        assert worst_error(result, expected) <= 1e-5


@pytest.mark.parametrize("impl", IMPLS)
def test_float64_stays_float64(impl):
    lengths = [300, 0, 129]
    shift = np.random.default_rng(0).normal(0, 1, 429)
    result = future_kl(torch.from_numpy(shift), lengths, 100.0, impl=impl)
    assert result.dtype == torch.float64
    assert worst_error(result, oracle.future_kl(shift, lengths, 100.0)) <= 1e-13


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_half_precision_is_computed_in_float32(impl, dtype):
    shift = (torch.randn(500, generator=torch.Generator().manual_seed(0)) * 0.05).to(dtype)
    result = future_kl(shift, [200, 300], 64.0, impl=impl)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, future_kl(shift.float(), [200, 300], 64.0, impl=impl), rtol=0, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_non_finite_shift_counts_as_zero(impl, bad):
    shift = torch.randn(64, generator=torch.Generator().manual_seed(1))
    spoiled, zeroed = shift.clone(), shift.clone()
    spoiled[40], zeroed[40] = bad, 0
    torch.testing.assert_close(
        future_kl(spoiled, [30, 34], 8.0, impl=impl), future_kl(zeroed, [30, 34], 8.0, impl=impl), rtol=0, atol=0
    )


neighbours = st.lists(
    st.tuples(st.one_of(st.sampled_from(BLOCK_EDGES), st.integers(0, 100)), st.sampled_from([0.0, 0.05, 1e30, 3e38])),
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    length=st.one_of(st.sampled_from(BLOCK_EDGES), st.integers(1, 1200)),
    before=neighbours,
    after=neighbours,
    decay_rate=st.one_of(st.sampled_from([1e-3, *DECAY_RATES]), st.floats(0.5, 4096)),
    hole_share=st.sampled_from([0.0, 0.3, 1.0]),
    trained_only=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    impl=st.sampled_from(IMPLS),
)
def test_what_else_is_in_the_batch_makes_no_difference(
    seed, length, before, after, decay_rate, hole_share, trained_only, dtype, impl
):
    """Bit for bit in the scan, for any values, lengths and places of the neighbours, also where their sums overflow."""
    rng = np.random.default_rng(seed)
    shift, mask = make_shift(seed, [length], spikes=3, hole_share=hole_share)
    shift, mask = torch.from_numpy(shift).to(dtype), torch.from_numpy(mask)

    def beside(parts):
        values = [torch.from_numpy(rng.choice([1.0, 0.7, -0.1], n) * size).to(dtype) for n, size in parts]
        return values, [torch.from_numpy(rng.random(n) < 0.7) for n, _ in parts]

    (values, masks), (later_values, later_masks) = beside(before), beside(after)
    lengths = [*(n for n, _ in before), length, *(n for n, _ in after)]
    packed, packed_mask = torch.cat([*values, shift, *later_values]), torch.cat([*masks, mask, *later_masks])
    alone = future_kl(shift, [length], decay_rate, decay_mask=mask if trained_only else None, impl=impl)
    result = future_kl(packed, lengths, decay_rate, decay_mask=packed_mask if trained_only else None, impl=impl)
    start = sum(n for n, _ in before)
    result = result[start : start + length]
    if impl == "scan":
        assert torch.equal(result, alone)
    else:
        scale = max(1e-30, alone.abs().max().item()) if length else 1.0
        torch.testing.assert_close(result, alone, rtol=0, atol=2e-7 * scale)


@pytest.mark.parametrize("impl", IMPLS)
def test_reduced_precision_elsewhere_does_not_reach_the_computation(impl):
    """Neither autocast nor reduced-precision matrix products, both usual in training."""
    lengths = [700, 77]
    shift, mask = make_shift(11, lengths, spikes=20)
    shift, mask = torch.from_numpy(shift), torch.from_numpy(mask)
    plain = [future_kl(shift, lengths, 256.0, decay_mask=m, impl=impl) for m in (None, mask)]
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            reduced = [future_kl(shift, lengths, 256.0, decay_mask=m, impl=impl) for m in (None, mask)]
    finally:
        torch.set_float32_matmul_precision(before)
    for expected, result in zip(plain, reduced, strict=True):
        assert result.dtype == torch.float32 and torch.equal(result, expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own use of it
@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_is_differentiated_in_forward_mode(impl):
    shift = torch.randn(40, generator=torch.Generator().manual_seed(0))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(shift, torch.ones_like(shift))
        result = future_kl(dual, [30, 10], 8.0, impl=impl)
        assert forward_ad.unpack_dual(result).tangent is None
        assert torch.equal(result, future_kl(shift, [30, 10], 8.0, impl=impl))


def test_a_tool_result_costs_no_distance_over_trained_tokens():
    """Cutting the masked tokens out altogether gives the same Future-KL on the trained ones."""
    shift, mask = make_shift(3, [2500], hole_share=0.0)
    mask[200:2200] = False
    shift[~mask] = 0
    mask, shift = torch.from_numpy(mask), torch.from_numpy(shift)
    for impl in IMPLS:
        kept = future_kl(shift, [2500], 32.0, decay_mask=mask, impl=impl)[mask]
        cut = future_kl(shift[mask], [500], 32.0, impl=impl)
        torch.testing.assert_close(kept, cut, rtol=1e-5, atol=1e-6)
        erased = future_kl(shift, [2500], 32.0, impl=impl)[mask]
        assert (erased - cut).abs().max() > 1e-2, "by position the 2,000 tokens do erase it"


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
@pytest.mark.parametrize("impl", IMPLS)
def test_no_tokens(impl, lengths):
    assert future_kl(torch.empty(0), lengths, 32.0, impl=impl).shape == (0,)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"shift": [0.1, 0.2]}, "shift is a list"),
        ({"shift": torch.zeros(2, 2)}, r"shift has shape \(2, 2\).*1-D"),
        ({"shift": torch.zeros(4, dtype=torch.int64)}, "shift has dtype torch.int64"),
        ({"lengths": [1, 2]}, "lengths add up to 3; they must add up to 4"),
        ({"lengths": [5, -1]}, "lengths holds -1"),
        ({"lengths": [2.0, 2.0]}, "lengths holds torch.float32"),
        ({"lengths": 4}, "lengths is a int"),
        ({"lengths": [[2], [2]]}, "lengths has shape"),
        ({"decay_rate": 0.0}, "decay_rate is 0.0"),
        ({"decay_rate": float("nan")}, "decay_rate is nan"),
        ({"decay_rate": float("inf")}, "decay_rate is inf"),
        ({"decay_rate": "32"}, "decay_rate is '32'"),
        ({"decay_rate": 10**400}, "decay_rate is 1000.*; it must be a finite number above 0"),
        ({"decay_mask": torch.ones(3)}, "decay_mask has 3 tokens; it must have 4"),
        ({"decay_mask": [1, 1, 1, 1]}, "decay_mask is a list"),
        ({"impl": "fast"}, "impl is 'fast'; it must be one of 'auto'"),
        ({"chunk_size": 0}, "chunk_size is 0"),
    ],
)
def test_errors_name_the_argument(kwargs, message):
    arguments = {"shift": torch.zeros(4), "lengths": [1, 3], "decay_rate": 32.0} | kwargs
    with pytest.raises(ValueError, match=message):
        future_kl(arguments.pop("shift"), arguments.pop("lengths"), arguments.pop("decay_rate"), **arguments)


@pytest.mark.parametrize("kind", [tuple, torch.tensor, np.array], ids=["tuple", "tensor", "numpy"])
def test_lengths_may_be_any_integer_sequence(kind):
    shift = torch.ones(4)
    assert torch.equal(future_kl(shift, kind([1, 3]), 4.0), future_kl(shift, [1, 3], 4.0))
