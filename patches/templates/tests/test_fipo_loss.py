"""CPU tests for --loss-type fipo_loss (FIPO, https://arxiv.org/abs/2603.19835).

The weights are checked against a per-token recurrence in float64 that shares no code with slime/utils/fipo.py, and
context parallelism against the same batch on one rank, with real gloo collectives.
"""

import argparse
import math
from argparse import Namespace

import _cp_dist_helpers  # installs the megatron stub, so it comes before slime's Megatron modules
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from slime.utils.fipo import FipoConfig, add_fipo_arguments, fipo_config_from_args, fipo_weights, validate_fipo_args

NUM_GPUS = 0

# prompt length, response length, advantage, ratios at chosen tokens, masked span
RESPONSES = [
    (7, 33, 1.0, {}, (0, 0)),
    (5, 1, -0.7, {}, (0, 0)),
    (3, 64, -1.2, {10: 2.5, 40: 3.5}, (12, 30)),  # a tool result between two turns
    (120, 6, 0.9, {}, (0, 0)),  # most CP ranks hold no response token
    (4, 41, -0.8, {2: 15.0, 37: 12.0}, (0, 0)),  # two dual-clipped tokens: dropped
    (6, 29, -0.8, {28: 15.0}, (0, 0)),  # one dual-clipped token: kept
    (11, 17, 0.3, {}, (0, 17)),  # fully masked
    (8, 51, 0.6, {3: 20.0}, (7, 8)),
]
SETTINGS = {
    "defaults": {},
    "short_decay": {"decay_rate": 1.0},
    "long_decay": {"decay_rate": 4096.0},
    "high_only": {"clip_high_only": True, "clip_ratio_high": 0.28},
    "unclipped": {"clip_influence": False},
    "safety_3": {"safety_thresh": 3.0},
    "no_safety": {"safety_thresh": None},
    "no_dual_clip": {"dual_clip_c": None},
    "no_filter": {"max_dual_clipped_tokens": None},
    "trained_tokens": {"decay_over": "trained_tokens", "decay_rate": 6.0},
}


def _samples():
    generator = torch.Generator().manual_seed(0)
    samples = {"log_ratio": [], "advantages": [], "loss_masks": []}
    for _, length, advantage, ratios, (start, stop) in RESPONSES:
        log_ratio = 0.05 * torch.randn(length, generator=generator, dtype=torch.float64)
        log_ratio += 0.02 * torch.randn(1, generator=generator, dtype=torch.float64)
        for position, ratio in ratios.items():
            log_ratio[position] = math.log(ratio)
        mask = torch.ones(length, dtype=torch.int)
        mask[start:stop] = 0
        samples["log_ratio"].append(log_ratio)
        samples["advantages"].append(torch.full((length,), advantage, dtype=torch.float64))
        samples["loss_masks"].append(mask)
    samples["response_lengths"] = [response[1] for response in RESPONSES]
    samples["total_lengths"] = [response[0] + response[1] for response in RESPONSES]
    return samples


def _expected_weights(log_ratio, advantages, mask, config):
    """One response, token by token, from the paper's equations."""
    c = config.dual_clip_c
    gamma = 2 ** (-1 / config.decay_rate)
    weights, carry, dual_clipped = [], 0.0, 0
    for shift, advantage, trained in zip(*(x.flip(0).tolist() for x in (log_ratio, advantages, mask)), strict=True):
        finite = math.isfinite(shift)
        shift = max(-20.0, min(20.0, shift)) if finite else 0.0
        too_high = c is not None and shift > math.log(c)
        step = gamma if config.decay_over == "positions" or trained else 1.0
        carry = (shift if trained and not too_high else 0.0) + step * carry
        low, high = config.influence_bounds
        weight = max(low, min(high, math.exp(carry)))
        if config.safety_thresh is not None and advantage < 0 and shift > math.log(config.safety_thresh):
            weight = max(0.8, min(1.0, weight))
        dual_clipped += bool(trained) and advantage < 0 and too_high
        weights.append(weight)
    limit = config.max_dual_clipped_tokens
    dropped = limit is not None and dual_clipped > limit
    return torch.tensor([0.0 if dropped else weight for weight in reversed(weights)], dtype=torch.float64)


def _weights(samples, config):
    packed = (torch.cat(samples[key]) for key in ("log_ratio", "advantages", "loss_masks"))
    return fipo_weights(*packed, samples["response_lengths"], config)


@pytest.mark.unit
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_weights_match_per_token_recurrence(settings):
    samples, config = _samples(), FipoConfig(**settings)
    per_response = zip(samples["log_ratio"], samples["advantages"], samples["loss_masks"], strict=True)
    expected = torch.cat([_expected_weights(*tensors, config) for tensors in per_response])

    torch.testing.assert_close(_weights(samples, config).weights, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.unit
def test_non_finite_shift_stays_on_its_token():
    samples, config = _samples(), FipoConfig()
    samples["log_ratio"][0][20] = 0.0
    expected = _weights(samples, config)
    for value in (math.nan, math.inf, -math.inf):
        samples["log_ratio"][0][20] = value
        result = _weights(samples, config)
        torch.testing.assert_close(result.weights, expected.weights)
        assert result.metrics["nonfinite_frac"].sum() == 1


def _cp_worker(rank, cp_size, port, path):
    _cp_dist_helpers.stub_megatron_in_worker(cp_size, rank)
    group = _cp_dist_helpers.init_worker_process_group(rank, cp_size, port)
    try:
        from megatron.core import mpu

        from slime.backends.megatron_utils.cp_utils import get_sum_of_sample_mean
        from slime.backends.megatron_utils.fipo import compute_fipo_weights

        mpu.get_context_parallel_group = lambda: group
        results = {}
        for name, settings in SETTINGS.items():
            samples = _samples()
            lengths = list(zip(samples["total_lengths"], samples["response_lengths"], strict=True))
            if cp_size > 1:
                for key in ("log_ratio", "advantages"):
                    local = (
                        _cp_dist_helpers.cp_chunk_response_tensor(x, *n)
                        for x, n in zip(samples[key], lengths, strict=True)
                    )
                    samples[key] = list(local)
            ppo_kl, advantages = -torch.cat(samples["log_ratio"]), torch.cat(samples["advantages"])
            reducer = get_sum_of_sample_mean(*zip(*lengths, strict=True), samples["loss_masks"])
            args = _args(fipo_log_detail=True, **_as_flags(settings))
            weights, metrics = compute_fipo_weights(
                args, {**samples, "log_probs": samples["log_ratio"]}, ppo_kl, advantages, reducer
            )
            loss = reducer(ppo_kl * weights)
            values = torch.stack([loss, *metrics.values()])
            dist.all_reduce(values, group=group)
            results[name] = dict(zip(["loss", *metrics], values.tolist(), strict=True))
        if rank == 0:
            torch.save(results, path)
    finally:
        dist.destroy_process_group()


def _as_flags(settings):
    flags = {f"fipo_{name}": "none" if value is None else value for name, value in settings.items()}
    if "fipo_clip_influence" in flags:
        flags["fipo_unclipped"] = not flags.pop("fipo_clip_influence")
    return flags


@pytest.mark.unit
def test_loss_and_metrics_are_cp_invariant(tmp_path):
    results = {}
    for cp_size in (1, 2, 4):
        path = tmp_path / f"cp{cp_size}.pt"
        mp.spawn(_cp_worker, (cp_size, _cp_dist_helpers.free_port(), path), nprocs=cp_size)
        results[cp_size] = torch.load(path, weights_only=True)

    for cp_size in (2, 4):
        for name in SETTINGS:
            assert results[cp_size][name] == pytest.approx(results[1][name], rel=1e-9, abs=1e-12), (cp_size, name)
    assert results[1]["defaults"]["fipo/dropped_frac"] > 0


def _args(**flags):
    """What policy_loss_function and validate_fipo_args read, at slime's defaults."""
    defaults = dict(
        advantage_estimator="grpo",
        compute_advantages_and_returns=True,
        custom_pg_loss_reducer_function_path=None,
        entropy_coef=0.0,
        eps_clip=0.2,
        eps_clip_c=None,
        eps_clip_high=0.28,
        get_mismatch_metrics=False,
        global_batch_size=64,
        loss_type="fipo_loss",
        n_samples_per_prompt=16,
        rollout_batch_size=32,
        rollout_top_p=1.0,
        use_kl_loss=False,
        use_opsm=False,
        use_rollout_logprobs=False,
        use_tis=False,
    )
    parsed = add_fipo_arguments(argparse.ArgumentParser()).parse_args([])
    return Namespace(**{**vars(parsed), **defaults, **flags})


def _policy_loss(monkeypatch, args):
    """Loss, gradient with respect to the log-probs, and metrics of slime's policy_loss_function."""
    from slime.backends.megatron_utils import loss as slime_loss
    from slime.backends.megatron_utils.cp_utils import get_sum_of_sample_mean

    samples = _samples()
    lengths = samples["response_lengths"]
    leaf = torch.cat(samples["log_ratio"]).float().requires_grad_()
    entropy = [torch.zeros(n) for n in lengths]
    outputs = {"log_probs": list(leaf.split(lengths)), "entropy": entropy}
    monkeypatch.setattr(slime_loss, "get_log_probs_and_entropy", lambda *_, **__: (None, outputs))
    batch = {
        **samples,
        "advantages": [advantage.float() for advantage in samples["advantages"]],
        "log_probs": [torch.zeros(n) for n in lengths],
        "unconcat_tokens": None,
        "rollout_mask_sums": [mask.sum() for mask in samples["loss_masks"]],
    }
    reducer = get_sum_of_sample_mean(samples["total_lengths"], lengths, samples["loss_masks"])
    with torch.compiler.set_stance("force_eager"):
        loss, metrics = slime_loss.policy_loss_function(args, batch, torch.zeros(1, 1, 1), reducer)
    loss.backward()
    return loss.detach(), leaf.grad, metrics


@pytest.mark.unit
def test_weights_of_one_leave_policy_loss_bitwise_the_same(monkeypatch):
    ones = _args(fipo_clip_ratio_low=0.0, fipo_clip_ratio_high=0.0, fipo_max_dual_clipped_tokens="none")
    loss, grad, _ = _policy_loss(monkeypatch, ones)

    from slime.backends.megatron_utils import loss as slime_loss

    original = slime_loss.compute_policy_loss
    monkeypatch.setattr(slime_loss, "compute_policy_loss", lambda *x, **_: original(*x[:4], eps_clip_c=10.0))
    expected_loss, expected_grad, metrics = _policy_loss(monkeypatch, _args(loss_type="policy_loss"))
    assert torch.equal(loss, expected_loss) and torch.equal(grad, expected_grad)
    assert not any(name.startswith("fipo/") for name in metrics)


@pytest.mark.unit
def test_gradient_is_policy_loss_gradient_times_weight(monkeypatch):
    samples = _samples()
    weights = _weights(samples, FipoConfig(dual_clip_c=10.0)).weights.float()
    ones = _args(fipo_clip_ratio_low=0.0, fipo_clip_ratio_high=0.0, fipo_max_dual_clipped_tokens="none")
    _, unweighted, _ = _policy_loss(monkeypatch, ones)
    _, grad, metrics = _policy_loss(monkeypatch, _args())

    torch.testing.assert_close(grad, unweighted * weights, rtol=1e-5, atol=1e-9)
    assert not torch.equal(grad, unweighted)
    assert {"fipo/future_kl", "fipo/influence_weight", "fipo/dropped_frac"} <= metrics.keys()


@pytest.mark.unit
def test_flags_win_over_the_preset():
    parser = add_fipo_arguments(argparse.ArgumentParser())
    args = parser.parse_args(["--fipo-preset", "7b", "--fipo-clip-ratio-high", "0.28", "--fipo-dual-clip-c", "none"])
    expected = FipoConfig(safety_thresh=3.0, clip_ratio_high=0.28, dual_clip_c=None)

    assert fipo_config_from_args(args) == expected
    assert fipo_config_from_args(parser.parse_args([])) == FipoConfig()


@pytest.mark.unit
def test_validation_writes_effective_settings_and_is_idempotent():
    args = _args(fipo_preset="32b", fipo_clip_ratio=0.1)
    validate_fipo_args(args)
    assert (args.fipo_clip_ratio_low, args.fipo_clip_ratio_high, args.fipo_clip_high_only) == (0.1, 0.1, True)
    assert args.eps_clip_c == args.fipo_dual_clip_c == 10.0

    before = dict(vars(args))
    validate_fipo_args(args)
    assert vars(args) == before


@pytest.mark.unit
@pytest.mark.parametrize(
    "flags, message",
    [
        ({"fipo_decay_rate": 0.0}, "--fipo-decay-rate"),
        ({"fipo_clip_ratio_low": 1.0}, "--fipo-clip-ratio-low"),
        ({"fipo_dual_clip_c": 1.2}, "--fipo-dual-clip-c"),
        ({"fipo_clip_ratio": 0.2, "fipo_clip_ratio_low": 0.1}, "--fipo-clip-ratio"),
        ({"fipo_preset": "13b"}, "--fipo-preset"),
        ({"eps_clip_c": 3.0}, "--eps-clip-c"),
        ({"advantage_estimator": "gspo"}, "--advantage-estimator gspo"),
        ({"compute_advantages_and_returns": False}, "--disable-compute-advantages-and-returns"),
        ({"global_batch_size": 512}, "--global-batch-size"),
        ({"fipo_shift_from": "train", "use_rollout_logprobs": True}, "--get-mismatch-metrics"),
        ({"loss_type": "policy_loss", "fipo_decay_rate": 8.0}, "--loss-type fipo_loss"),
    ],
)
def test_validation_names_the_flag(flags, message):
    with pytest.raises(ValueError, match=message):
        validate_fipo_args(_args(**flags))


@pytest.mark.unit
def test_missing_old_log_probs_are_refused():
    from slime.backends.megatron_utils.fipo import compute_fipo_weights

    with pytest.raises(ValueError, match="log_probs"):
        compute_fipo_weights(_args(), {"log_probs": None}, torch.zeros(0), torch.zeros(0), torch.sum)


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
