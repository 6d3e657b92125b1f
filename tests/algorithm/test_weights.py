"""Influence weights, their metrics and the policy loss: against the token-by-token oracle, and at the edges."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad

from slime_fipo import FipoConfig, fipo_policy_loss, fipo_weights
from slime_fipo.algorithm.weights import METRICS

from . import oracle
from .memory import peak_extra_bytes


def make_batch(seed, lengths, sigma=0.3, spikes=0, hole_share=0.0, dtype=torch.float32):
    """(log_probs, old_log_probs, advantages, loss_mask) with token-level advantages of both signs."""
    rng = np.random.default_rng(seed)
    total = sum(lengths)
    old = -rng.exponential(1, total)
    shift = rng.normal(0, sigma, total)
    if total and spikes:
        shift[rng.integers(0, total, spikes)] = rng.choice([-25.0, 2.5, 3.5, 25.0], spikes)
    advantages = np.repeat(rng.normal(0, 1, len(lengths)), lengths) + rng.normal(0, 0.1, total)
    mask = (rng.random(total) >= hole_share).astype(np.int64)
    floats = (torch.tensor(x, dtype=dtype) for x in (old + shift, old, advantages))
    return *floats, torch.tensor(mask)


configs = st.builds(
    FipoConfig,
    decay_rate=st.sampled_from([0.5, 8.0, 32.0, 4096.0]),
    clip_ratio_low=st.sampled_from([0.0, 0.2, 0.9]),
    clip_ratio_high=st.sampled_from([0.0, 0.2, 3.0]),
    clip_high_only=st.booleans(),
    clip_influence=st.booleans(),
    safety_thresh=st.sampled_from([None, 1.1, 3.0, 10.0]),
    dual_clip_c=st.sampled_from([None, 1.5, 3.0, 10.0]),
    max_dual_clipped_tokens=st.sampled_from([None, 0, 1, 3]),
    decay_over=st.sampled_from(["positions", "trained_tokens"]),
    impl=st.sampled_from(["chunked", "scan"]),
)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    lengths=st.lists(st.integers(0, 150), max_size=6),
    spikes=st.integers(0, 8),
    hole_share=st.sampled_from([0.0, 0.4, 1.0]),
    config=configs,
)
def test_weights_agree_with_the_oracle(seed, lengths, spikes, hole_share, config):
    batch = make_batch(seed, lengths, spikes=spikes, hole_share=hole_share, dtype=torch.float64)
    result = fipo_weights(*batch, lengths, config)
    weights, future, keep = oracle.weights(*(x.numpy() for x in batch), lengths, config)
    np.testing.assert_allclose(
        result.future_kl.numpy(), future, rtol=0, atol=1e-9 * max(1, np.abs(future).max(initial=0))
    )
    np.testing.assert_allclose(result.weights.numpy(), weights, rtol=1e-7, atol=1e-9)
    assert result.keep.tolist() == keep.tolist()


@pytest.mark.parametrize("impl", ["chunked", "scan"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("which", [0, 1], ids=["log_probs", "old_log_probs"])
def test_a_non_finite_token_leaves_the_others_alone(impl, bad, which):
    lengths = [40, 60, 3]
    batch = list(make_batch(5, lengths, spikes=4))
    config = FipoConfig.preset("7b", impl=impl)
    # The token is out of Future-KL either way: compare with the batch in which it is masked but for its distance.
    neutral = [x.clone() for x in batch]
    neutral[0][70] = neutral[1][70] = -1.0
    expected = fipo_weights(*neutral, lengths, config)
    batch[which] = batch[which].clone()
    batch[which][70] = bad
    result = fipo_weights(*batch, lengths, config)
    others = torch.arange(103) != 70
    assert torch.equal(result.weights[others], expected.weights[others])
    assert result.weights.isfinite().all() and result.future_kl.isfinite().all()
    assert result.metrics["nonfinite_frac"].sum() == 1 and result.metrics["nonfinite_frac"][70] == 1
    loss, _ = fipo_policy_loss(*batch, lengths, config)
    assert loss[others].isfinite().all()
    if not math.isfinite(batch[0][70].item()) and math.isnan(bad):
        assert loss[70].isnan(), "the host's own NaN checks must still fire"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["log_probs", "old_log_probs", "advantages"])
def test_the_loss_is_zero_where_nothing_is_trained(which, bad):
    """Whatever stands under the mask: value and gradient are exactly 0, so that loss · mask is no NaN."""
    lengths = [40, 60, 3]
    clean = make_batch(5, lengths, spikes=4, hole_share=0.4)
    mask = clean[3]
    batch = [x.clone() for x in clean]
    batch[which][mask == 0] = bad

    def loss_and_gradient(log_probs, *others):
        log_probs = log_probs.clone().requires_grad_()
        loss, _ = fipo_policy_loss(log_probs, *others, lengths, FipoConfig.preset("7b"))
        (loss * mask).sum().backward()
        return loss.detach(), log_probs.grad

    expected, result = loss_and_gradient(*clean), loss_and_gradient(*batch)
    for ours, of_clean in zip(result, expected, strict=True):
        assert (ours[mask == 0] == 0).all()
        assert torch.equal(ours, of_clean)


def test_a_nan_on_a_trained_token_stays_visible():
    for which in (0, 1, 2):
        batch = [x.clone() for x in make_batch(5, [40, 60], hole_share=0.4)]
        token = batch[3].nonzero()[7]
        batch[which][token] = float("nan")
        loss, result = fipo_policy_loss(*batch, [40, 60], FipoConfig())
        assert loss.isnan().nonzero().flatten().tolist() == token.tolist()
        assert (loss * batch[3]).sum().isnan() and result.weights.isfinite().all()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    length=st.sampled_from([0, 1, 2, 31, 32, 33, 64, 65, 300]),
    before=st.lists(st.integers(0, 70), max_size=3),
    after=st.lists(st.integers(0, 700), max_size=2),
    bad=st.sampled_from([None, float("nan"), float("inf"), float("-inf")]),
    decay_over=st.sampled_from(["positions", "trained_tokens"]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_what_else_is_in_the_batch_makes_no_difference(seed, length, before, after, bad, decay_over, dtype):
    """Bit for bit, weights, Future-KL and metrics, for any neighbours, also where they are not finite."""
    config = FipoConfig.preset("7b", decay_over=decay_over)
    own = [x.to(dtype) for x in make_batch(seed, [length], spikes=3, hole_share=0.3)]
    parts = [[x.to(dtype) for x in make_batch(seed + 1 + i, [n], spikes=5)] for i, n in enumerate([*before, *after])]
    if bad is not None:
        for part in parts:
            part[0][::3] = bad
    parts.insert(len(before), own)
    alone = fipo_weights(*own, [length], config)
    lengths = [*before, length, *after]
    result = fipo_weights(*(torch.cat(x) for x in zip(*parts, strict=True)), lengths, config)
    here = slice(sum(before), sum(before) + length)
    assert torch.equal(result.weights[here], alone.weights) and torch.equal(result.future_kl[here], alone.future_kl)
    assert result.keep[len(before)] == alone.keep[0]
    assert all(torch.equal(result.metrics[name][here], alone.metrics[name]) for name in METRICS)


def test_a_fully_masked_batch():
    lengths = [5, 0, 7]
    log_probs, old, advantages, mask = make_batch(1, lengths, spikes=6)
    loss, result = fipo_policy_loss(
        log_probs.requires_grad_(), old, advantages, torch.zeros_like(mask), lengths, FipoConfig()
    )
    assert result.keep.all() and torch.equal(result.future_kl, torch.zeros(12))
    (loss * 0).sum().backward()
    assert log_probs.grad.isfinite().all()


def test_no_responses_at_all():
    empty = torch.empty(0)
    result = fipo_weights(empty, empty, empty, empty, [], FipoConfig())
    assert result.weights.shape == (0,) and result.keep.shape == (0,)
    assert all(value.shape == (0,) for value in result.metrics.values())


def test_the_sequence_filter_drops_at_more_than_the_limit():
    """Two of five negative tokens above c: dropped at a limit of 1, kept at 2, at None, and with c off."""
    log_probs = torch.tensor([0.0, 3.0, 0.0, 3.0, 0.0]) - 5
    batch = (log_probs, torch.full((5,), -5.0), -torch.ones(5), torch.ones(5))
    for limit, keep in ((0, False), (1, False), (2, True), (None, True)):
        result = fipo_weights(*batch, [5], FipoConfig(max_dual_clipped_tokens=limit))
        assert result.keep.tolist() == [keep]
        assert (result.weights == 0).all().item() is not keep
        assert result.metrics["dropped_frac"].tolist() == [float(not keep)] * 5
    assert fipo_weights(*batch, [5], FipoConfig(dual_clip_c=None)).keep.tolist() == [True]
    assert fipo_weights(*batch[:2], torch.ones(5), batch[3], [5], FipoConfig()).keep.tolist() == [True]


def test_metrics_by_hand():
    """One token per ratio, each a response of its own, so that F is the token's own shift."""
    ratios = torch.tensor([1.0, 1.1, 1.5, 0.5, 2.5, 3.5, 5.0, 12.0])
    config = FipoConfig(safety_thresh=3.0, dual_clip_c=10.0)
    old = torch.full((8,), -9.0, dtype=torch.float64)
    result = fipo_weights(old + ratios.double().log(), old, -torch.ones(8), torch.ones(8), [1] * 8, config)
    got = {name: value.tolist() for name, value in result.metrics.items()}
    assert tuple(got) == METRICS
    assert result.weights.tolist() == pytest.approx([1.0, 1.1, 1.2, 0.8, 1.2, 1.0, 1.0, 1.0])
    assert got["influence_deviation"] == pytest.approx([0, 0.1, 0.2, 0.2, 0.2, 0, 0, 0])
    assert got["clip_high_frac"] == [0, 0, 1, 0, 1, 0, 0, 0]
    assert got["clip_low_frac"] == [0, 0, 0, 1, 0, 0, 0, 0]
    assert got["safety_capped_frac"] == [0, 0, 0, 0, 0, 1, 1, 1]
    assert got["excluded_frac"] == [0, 0, 0, 0, 0, 0, 0, 1]
    assert got["neg_ratio_2_3"] == [0, 0, 0, 0, 1, 0, 0, 0]
    assert got["neg_ratio_3_4"] == [0, 0, 0, 0, 0, 1, 0, 0]
    assert got["neg_ratio_4_c"] == [0, 0, 0, 0, 0, 0, 1, 0]
    assert got["nonfinite_frac"] == got["dropped_frac"] == [0] * 8


def test_on_policy_every_weight_is_one_and_nothing_counts_as_clipped():
    log_probs, _, advantages, mask = make_batch(3, [50, 30])
    for preset in ("7b", "32b"):
        result = fipo_weights(log_probs, log_probs, advantages, mask, [50, 30], FipoConfig.preset(preset))
        assert torch.equal(result.weights, torch.ones(80))
        assert result.metrics["clip_low_frac"].sum() == result.metrics["clip_high_frac"].sum() == 0


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own use of it
@pytest.mark.parametrize("impl", ["chunked", "scan"])
def test_forward_mode_sees_the_weights_as_constants(impl):
    """The loss's directional derivative is its gradient's product with the direction; the weights have none."""
    log_probs, *others = make_batch(4, [20, 30], dtype=torch.float64)
    config = FipoConfig(impl=impl, clip_influence=False)
    direction = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with forward_ad.dual_level():
        loss, result = fipo_policy_loss(forward_ad.make_dual(log_probs, direction), *others, [20, 30], config)
        tangent = forward_ad.unpack_dual(loss).tangent
        for value in (result.weights, result.future_kl, *result.metrics.values()):
            assert forward_ad.unpack_dual(value).tangent is None
    leaf = log_probs.clone().requires_grad_()
    loss, _ = fipo_policy_loss(leaf, *others, [20, 30], config)
    loss.sum().backward()
    torch.testing.assert_close(tangent, leaf.grad * direction)


def test_no_output_shares_memory_with_another():
    """Also not the metric with the Future-KL: a host may write into either."""
    batch = make_batch(4, [20, 30])
    for impl in ("chunked", "scan"):
        result = fipo_weights(*batch, [20, 30], FipoConfig(impl=impl))
        values = [*batch, result.weights, result.future_kl, *result.metrics.values()]
        assert len({x.untyped_storage().data_ptr() for x in values}) == len(values)
        expected = result.future_kl.clone()
        result.metrics["future_kl"].zero_()
        assert torch.equal(result.future_kl, expected)


def test_results_can_be_compared():
    first, second = (fipo_weights(*make_batch(4, [20]), [20], FipoConfig()) for _ in range(2))
    assert first == first and first != second and len({first, second}) == 2


def test_the_compiler_leaves_it_alone():
    """One break of the graph around each call, and nothing to compile again for other lengths."""
    from torch._dynamo.testing import CompileCounter

    from slime_fipo import future_kl

    def step(log_probs, old, advantages, mask, lengths):
        shift = future_kl(log_probs - old, lengths.split, 32.0)
        weights = fipo_weights(log_probs * 1, old, advantages, mask, lengths.split, FipoConfig()).weights
        return (log_probs * weights + shift).sum()

    class Lengths:  # the compiler guards on how many there are, so their number stays
        split = None

    torch._dynamo.reset()
    backend = CompileCounter()
    compiled = torch.compile(step, backend=backend)
    lengths = Lengths()
    for split in ([40, 24, 0], [24, 40, 0], [1, 62, 1], [0, 0, 64], [0, 64, 0]):
        lengths.split = split
        batch = make_batch(3, [64])
        torch.testing.assert_close(compiled(*batch, lengths), step(*batch, lengths))
    torch._dynamo.reset()
    assert backend.frame_count <= 6, backend.frame_count  # three parts, each for one length and for any


def test_weights_carry_no_gradient_and_the_loss_does():
    log_probs, old, advantages, mask = make_batch(4, [20, 30])
    log_probs.requires_grad_()
    loss, result = fipo_policy_loss(log_probs, old, advantages, mask, [20, 30], FipoConfig())
    assert not result.weights.requires_grad and not any(m.requires_grad for m in result.metrics.values())
    loss.sum().backward()
    # Homogeneity: the weighted loss's gradient is the weight times the unweighted loss's.
    again = log_probs.detach().clone().requires_grad_()
    plain, ones = fipo_policy_loss(
        again, old, advantages, mask, [20, 30], FipoConfig(clip_ratio_low=0.0, clip_ratio_high=0.0)
    )
    assert torch.equal(ones.weights, torch.ones(50))
    plain.sum().backward()
    torch.testing.assert_close(log_probs.grad, again.grad * result.weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_every_floating_dtype(dtype):
    lengths = [60, 1, 39]
    batch = [x.to(dtype) for x in make_batch(6, lengths, spikes=3)]
    result = fipo_weights(*batch, lengths, FipoConfig.preset("7b"))
    exact = fipo_weights(*(x.double() for x in batch), lengths, FipoConfig.preset("7b"))
    assert result.weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(result.weights.double(), exact.weights, rtol=0, atol=1e-5)


@pytest.mark.parametrize("decay_over", ["positions", "trained_tokens"])
def test_nothing_waits_for_the_device(decay_over):
    """On the meta device there are no values: any read of one on the host would raise."""
    token = torch.empty(700, device="meta")
    config = FipoConfig(decay_over=decay_over, impl="scan")
    loss, result = fipo_policy_loss(token, token, token, token, [0, 300, 1, 399], config)
    assert loss.device.type == "meta" and result.weights.shape == (700,) and result.keep.shape == (4,)
    assert set(result.metrics) == set(METRICS)


@pytest.mark.parametrize("decay_over", ["positions", "trained_tokens"])
def test_peak_memory(decay_over):
    """At most 10 floats per token besides what is returned, for future_kl and fipo_weights."""
    from slime_fipo import future_kl

    lengths = [1000] * 100 + [1] * 1000 + [99_000]
    batch = make_batch(8, lengths)
    tokens = sum(lengths)
    config = FipoConfig(decay_over=decay_over)
    decay_mask = batch[3] if decay_over == "trained_tokens" else None
    extra = peak_extra_bytes(lambda: future_kl(batch[0], lengths, 32.0, decay_mask=decay_mask))
    assert extra <= 10 * 4 * tokens
    extra = peak_extra_bytes(lambda: fipo_weights(*batch, lengths, config))
    assert extra <= 10 * 4 * tokens


def test_only_the_metrics_asked_for():
    batch = make_batch(9, [10])
    for names in (("future_kl",), ["dropped_frac", "future_kl"], (), {"excluded_frac": 1}.keys()):
        for kind in (list, tuple, iter, lambda x: (name for name in x)):
            metrics = fipo_weights(*batch, [10], FipoConfig(), metrics=kind(names)).metrics
            assert tuple(metrics) == tuple(names)
    for names in (("entropy",), iter(["future_kl", "entropy"]), None, [["future_kl"]]):
        with pytest.raises(ValueError, match=r"metrics holds \[.*\]; it must hold names out of"):
            fipo_weights(*batch, [10], FipoConfig(), metrics=names)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, [0.0] * 4, "log_probs is a list"),
        (0, torch.zeros(4, dtype=torch.int32), "log_probs has dtype torch.int32"),
        (1, torch.zeros(3), "old_log_probs has 3 tokens; it must have 4, as log_probs has"),
        (1, None, "old_log_probs is a NoneType"),
        (2, 1.0, "advantages is a float"),
        (2, torch.zeros(2, 2), r"advantages has shape \(2, 2\)"),
        (3, torch.ones(4, device="meta"), "loss_mask is on meta; it must be on cpu"),
        (4, [1, 2], "lengths add up to 3"),
        (5, {"decay_rate": 32}, "config is a dict; it must be a FipoConfig"),
    ],
)
def test_errors_name_the_argument(position, value, message):
    arguments = [torch.zeros(4), torch.zeros(4), torch.ones(4), torch.ones(4), [1, 3], FipoConfig()]
    arguments[position] = value
    for function in (fipo_weights, fipo_policy_loss):
        with pytest.raises(ValueError, match=message):
            function(*arguments)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"eps_clip": -0.1}, "eps_clip is -0.1"),
        ({"eps_clip": "0.2"}, "eps_clip is '0.2'"),
        ({"eps_clip_high": float("nan")}, "eps_clip_high is nan"),
        ({"eps_clip_high": 9.0}, r"dual_clip_c is 10; it must be above 1 \+ eps_clip_high = 10"),
    ],
)
def test_clip_ranges_of_the_policy_loss(kwargs, message):
    token = torch.zeros(4)
    with pytest.raises(ValueError, match=message):
        fipo_policy_loss(token, token, token, token, [4], FipoConfig(), **kwargs)
