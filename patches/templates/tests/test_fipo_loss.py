"""CPU tests for --loss-type fipo_loss (FIPO, https://arxiv.org/abs/2603.19835).

The weights are checked against a per-token recurrence in float64 that shares no code with slime/utils/fipo.py, and
context parallelism against the same batch on one rank, with real gloo collectives. From parse_args over train_one_step
to loss_function the code under test is slime's own; Megatron and the model are replaced.
"""

import argparse
import importlib.util
import math
import sys
from argparse import Namespace
from pathlib import Path
from unittest.mock import MagicMock

import _cp_dist_helpers  # installs the megatron stub, so it comes before slime's Megatron modules
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_megatron_argument_validation import load_slime_arguments_module, make_slime_validate_args

from slime.backends.megatron_utils import loss as slime_loss
from slime.backends.megatron_utils.cp_utils import all_gather_with_cp, get_sum_of_sample_mean
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
# Every weight is 1.
ONES = {"fipo_clip_ratio_low": 0.0, "fipo_clip_ratio_high": 0.0, "fipo_max_dual_clipped_tokens": "none"}


def _samples():
    """Per response: float64 log-ratios to the trainer's old log-probs, advantages, masks; and the lengths."""
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


def _expected(log_ratio, advantages, mask, config):
    """Future-KL and weights of one response, token by token, from the paper's equations."""
    c = config.dual_clip_c
    gamma = 2 ** (-1 / config.decay_rate)
    future_kl, weights, carry, dual_clipped = [], [], 0.0, 0
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
        future_kl.append(carry)
        weights.append(weight)
    limit = config.max_dual_clipped_tokens
    dropped = limit is not None and dual_clipped > limit
    weights = [0.0 if dropped else weight for weight in weights]
    return torch.tensor([future_kl[::-1], weights[::-1]], dtype=torch.float64)


def _expected_of_batch(samples, config, log_ratios=None):
    """Packed Future-KL and weights."""
    log_ratios = samples["log_ratio"] if log_ratios is None else log_ratios
    per_response = zip(log_ratios, samples["advantages"], samples["loss_masks"], strict=True)
    return torch.cat([_expected(*tensors, config) for tensors in per_response], dim=1)


def _weights(samples, config):
    packed = (torch.cat(samples[key]) for key in ("log_ratio", "advantages", "loss_masks"))
    return fipo_weights(*packed, samples["response_lengths"], config)


@pytest.mark.unit
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_weights_match_per_token_recurrence(settings):
    samples, config = _samples(), FipoConfig(**settings)
    _, expected = _expected_of_batch(samples, config)

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


def _args(**flags):
    """What the loss and validate_fipo_args read, at slime's defaults."""
    defaults = dict(
        advantage_estimator="grpo",
        allgather_cp=False,
        calculate_per_token_loss=False,
        compute_advantages_and_returns=True,
        custom_pg_loss_reducer_function_path=None,
        entropy_coef=0.0,
        eps_clip=0.2,
        eps_clip_c=None,
        eps_clip_high=0.28,
        get_mismatch_metrics=False,
        global_batch_size=64,
        keep_old_actor=False,
        loss_type="fipo_loss",
        n_samples_per_prompt=16,
        recompute_loss_function=False,
        rollout_batch_size=32,
        rollout_top_p=1.0,
        use_kl_loss=False,
        use_opsm=False,
        use_rollout_logprobs=False,
        use_tis=False,
    )
    parsed = add_fipo_arguments(argparse.ArgumentParser()).parse_args([])
    return Namespace(**{**vars(parsed), **defaults, **flags})


def _validated(step_id=1, **flags):
    """_args as they reach the loss."""
    args = _args(**flags)
    validate_fipo_args(args)
    return Namespace(**vars(args), fipo_step_id=step_id)


def _batch(samples, slice_fn=lambda tensor, *_: tensor):
    """The micro-batch, its per-token lists as this rank has them, and the policy's log-probs as leaves.

    The policy is log_ratio away from Megatron's old log-probs, which SGLang's differ from by engine noise.
    """
    generator = torch.Generator().manual_seed(1)
    lengths = list(zip(samples["total_lengths"], samples["response_lengths"], strict=True))
    old = [-3.0 * torch.rand(n, generator=generator, dtype=torch.float64) for _, n in lengths]
    noise = [0.03 * torch.randn(n, generator=generator, dtype=torch.float64) for _, n in lengths]
    per_token = {
        "advantages": samples["advantages"],
        "log_probs": old,
        "rollout_log_probs": [a + b for a, b in zip(old, noise, strict=True)],
        "policy": [a + b for a, b in zip(old, samples["log_ratio"], strict=True)],
    }
    for key, tensors in per_token.items():
        per_token[key] = [slice_fn(tensor, *n) for tensor, n in zip(tensors, lengths, strict=True)]
    policy = [tensor.detach().requires_grad_() for tensor in per_token.pop("policy")]
    batch = {
        **per_token,
        "loss_masks": samples["loss_masks"],
        "response_lengths": samples["response_lengths"],
        "rollout_mask_sums": [mask.sum() for mask in samples["loss_masks"]],
        "total_lengths": samples["total_lengths"],
        "unconcat_tokens": None,
    }
    return batch, policy


def _log_probs_of(policy):
    """Stands for get_log_probs_and_entropy, whose log-probs are then the leaves of the gradient."""
    entropy = [torch.zeros(log_probs.numel()) for log_probs in policy]
    return lambda *_, **__: (None, {"log_probs": policy, "entropy": entropy})


def _loss_function(monkeypatch, args):
    """slime's loss_function: loss, gradient with respect to the packed log-probs, metrics as sums over responses."""
    batch, policy = _batch(_samples())
    monkeypatch.setattr(slime_loss, "get_log_probs_and_entropy", _log_probs_of(policy))
    monkeypatch.setattr(slime_loss.mpu, "get_data_parallel_world_size", lambda **_: 1, raising=False)
    with torch.compiler.set_stance("force_eager"):
        loss, _, log = slime_loss.loss_function(args, batch, 1, len(RESPONSES), torch.zeros(1, 1, 1))
    loss.backward()
    metrics = dict(zip(log["keys"], log["values"][1:].tolist(), strict=True))
    return loss.detach(), torch.cat([log_probs.grad for log_probs in policy]), metrics


@pytest.mark.unit
@pytest.mark.parametrize("per_token", [False, True], ids=["sample_mean", "per_token"])
def test_weights_of_one_are_policy_loss_bitwise(monkeypatch, per_token):
    loss, grad, _ = _loss_function(monkeypatch, _validated(calculate_per_token_loss=per_token, **ONES))

    original = slime_loss.compute_policy_loss
    monkeypatch.setattr(slime_loss, "compute_policy_loss", lambda *x, **_: original(*x[:4], eps_clip_c=10.0))
    args = _args(calculate_per_token_loss=per_token, loss_type="policy_loss")
    expected_loss, expected_grad, metrics = _loss_function(monkeypatch, args)
    assert torch.equal(loss, expected_loss) and torch.equal(grad, expected_grad)
    assert not any(name.startswith("fipo/") for name in metrics)


@pytest.mark.unit
@pytest.mark.parametrize("per_token", [False, True], ids=["sample_mean", "per_token"])
@pytest.mark.parametrize("shift", ["train", "rollout", "train_beside_rollout"])
@pytest.mark.parametrize("step_id", [0, 1])
def test_loss_function_matches_recurrence(monkeypatch, per_token, shift, step_id):
    flags = dict(calculate_per_token_loss=per_token, step_id=step_id, fipo_log_detail=True)
    if shift != "train":
        flags.update(use_rollout_logprobs=True)
    if shift == "train_beside_rollout":
        flags.update(fipo_shift_from="train", get_mismatch_metrics=True)
    args = _validated(**flags)
    unweighted = _validated(**flags, **ONES)
    # Only slime's recomputation of the log-probs is wanted of it here, not its correction of the loss.
    args.get_mismatch_metrics = unweighted.get_mismatch_metrics = False

    samples = _samples()
    batch, policy = _batch(samples)
    old = batch["rollout_log_probs" if shift == "rollout" else "log_probs"]
    log_ratios = [(new - tensor).detach() for new, tensor in zip(policy, old, strict=True)]
    future_kl, weights = _expected_of_batch(samples, FipoConfig(), log_ratios)
    lengths = (samples["total_lengths"], samples["response_lengths"])
    reducer = get_sum_of_sample_mean(*lengths, samples["loss_masks"], batch["rollout_mask_sums"], per_token)

    _, grad, metrics = _loss_function(monkeypatch, args)
    _, unweighted_grad, _ = _loss_function(monkeypatch, unweighted)
    torch.testing.assert_close(grad, unweighted_grad * weights, rtol=1e-9, atol=1e-12)
    assert not torch.equal(grad, unweighted_grad)

    assert metrics["fipo/future_kl"] == pytest.approx(reducer(future_kl).item(), rel=1e-5)
    mismatch = {name: value for name, value in metrics.items() if name.startswith("fipo/mismatch_")}
    if shift != "rollout" or step_id != 0:
        assert mismatch == {}
        return
    clipped = (future_kl.exp() > 1.2) | (future_kl.exp() < 0.8)
    assert mismatch == {
        "fipo/mismatch_future_kl_abs": pytest.approx(reducer(future_kl.abs()).item(), rel=1e-5),
        "fipo/mismatch_clip_frac": pytest.approx(reducer(clipped.double()).item(), rel=1e-5),
    }


def _load_model_module(monkeypatch):
    """slime/backends/megatron_utils/model.py with everything but its own code and the loss replaced."""
    package = "slime.backends.megatron_utils"
    stubs = [f"{package}.{name}" for name in ("checkpoint", "data", "model_provider", "stateless_adam")]
    stubs += [f"megatron.core.{name}" for name in ("distributed", "enums", "optimizer", "optimizer.optimizer")]
    stubs += [f"megatron.core.{name}" for name in ("models", "models.gpt", "optimizer_param_scheduler", "utils")]
    stubs += [f"megatron.core.{name}" for name in ("pipeline_parallel", "pipeline_parallel.utils")]
    stubs += ["megatron.training", "megatron.training.global_vars", "megatron.training.training"]
    for name in stubs:
        monkeypatch.setitem(sys.modules, name, MagicMock())
    path = Path(__file__).resolve().parents[1] / "slime" / "backends" / "megatron_utils" / "model.py"
    spec = importlib.util.spec_from_file_location(f"{package}.test_fipo_loss_model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.unit
def test_train_one_step_reports_mismatch_at_the_first_step_only(monkeypatch):
    module = _load_model_module(monkeypatch)
    args = _validated(use_rollout_logprobs=True)
    del args.fipo_step_id
    for name in ("ci_test", "custom_megatron_before_train_step_hook_path", "enable_mtp_training"):
        setattr(args, name, None)
    args.check_for_nan_in_loss_and_grad, args.save_debug_train_data = True, None
    args.data_pad_size_multiplier, args.seq_length, args.micro_batch_size, args.decoder_seq_length = 128, 1, 1, None

    batch, policy = _batch(_samples())
    batch.update(tokens=None, packed_seq_params=None, full_loss_masks=None, multimodal_train_inputs=None)

    def forward_backward(forward_step_func, data_iterator, model, **_):
        output, loss_func = forward_step_func(data_iterator, model[0])
        return [loss_func(output)[2]]

    monkeypatch.setattr(module, "get_args", lambda: args)
    monkeypatch.setattr(module, "get_batch", lambda *_: batch)
    monkeypatch.setattr(module, "get_forward_backward_func", lambda: forward_backward)
    monkeypatch.setattr(slime_loss, "get_log_probs_and_entropy", _log_probs_of(policy))
    monkeypatch.setattr(slime_loss.mpu, "get_data_parallel_world_size", lambda **_: 1, raising=False)
    monkeypatch.setattr(slime_loss.mpu, "get_data_parallel_group", lambda **_: None, raising=False)
    monkeypatch.setattr(slime_loss.mpu, "is_pipeline_last_stage", lambda **_: True, raising=False)
    monkeypatch.setattr(dist, "all_reduce", lambda *_, **__: None)
    optimizer, scheduler = MagicMock(), MagicMock()
    optimizer.step.return_value = (True, 1.0, None)
    model = MagicMock(return_value=torch.zeros(1, 1, 1))

    reported = []
    with torch.compiler.set_stance("force_eager"):
        for step_id in (0, 1):
            losses, _ = module.train_one_step(args, 3, step_id, None, [model], optimizer, scheduler, 1, len(RESPONSES))
            reported.append({name for name in losses if name.startswith("fipo/")})
    assert reported[0] - reported[1] == {"fipo/mismatch_future_kl_abs", "fipo/mismatch_clip_frac"}
    assert "fipo/influence_weight" in reported[1]


def _parse_args(monkeypatch, *flags):
    """slime's parse_args, with the rest of what it validates at that test's values."""
    module = load_slime_arguments_module(monkeypatch)

    def megatron_parse_args(extra_args_provider, **_):
        parsed = extra_args_provider(argparse.ArgumentParser()).parse_args()
        return Namespace(**{**vars(make_slime_validate_args()), "eps_clip_c": None, **vars(parsed)})

    megatron_arguments = MagicMock(megatron_parse_args=megatron_parse_args)
    monkeypatch.setitem(sys.modules, "slime.backends.megatron_utils.arguments", megatron_arguments)
    monkeypatch.setattr(sys, "argv", ["train.py", "--rollout-batch-size", "32", "--n-samples-per-prompt", "16", *flags])
    return module.parse_args()


@pytest.mark.unit
def test_parse_args_takes_and_validates_fipo(monkeypatch):
    flags = ["--global-batch-size", "64", "--loss-type", "fipo_loss", "--hf-checkpoint", "hf", "--num-rollout", "1"]
    args = _parse_args(monkeypatch, *flags, "--fipo-preset", "7b", "--fipo-decay-rate", "64")
    assert (args.loss_type, args.fipo_decay_rate, args.fipo_safety_thresh, args.eps_clip_c) == ("fipo_loss", 64, 3, 10)

    with pytest.raises(ValueError, match="--fipo-decay-rate"):
        _parse_args(monkeypatch, *flags, "--fipo-decay-rate", "0")


@pytest.mark.unit
def test_flags_win_over_the_preset():
    args = _args(fipo_preset="7b", fipo_clip_ratio_high=0.28, fipo_dual_clip_c="none")

    assert fipo_config_from_args(args) == FipoConfig(safety_thresh=3.0, clip_ratio_high=0.28, dual_clip_c=None)
    assert fipo_config_from_args(_args()) == FipoConfig()


@pytest.mark.unit
@pytest.mark.parametrize("flags", [{"fipo_preset": "32b", "fipo_clip_ratio": 0.1}, {"fipo_unclipped": True}, ONES])
def test_validation_writes_effective_settings(flags):
    args = _args(**flags)
    config = fipo_config_from_args(args)
    before = dict(vars(args))
    assert fipo_config_from_args(args) == config and vars(args) == before

    validate_fipo_args(args)
    assert args.eps_clip_c == args.fipo_dual_clip_c == 10.0
    assert args.fipo_safety_thresh == config.safety_thresh and args.fipo_shift_from == "ratio"
    assert fipo_config_from_args(args) == config


@pytest.mark.unit
def test_one_step_per_rollout_needs_another_policys_log_probs():
    single = {"global_batch_size": 512, "fipo_allow_single_step": True}
    stale = {**single, "use_rollout_logprobs": True}
    from_train = {**stale, "fipo_shift_from": "train", "get_mismatch_metrics": True}
    for flags in (stale, {**single, "keep_old_actor": True}, {**from_train, "keep_old_actor": True}):
        validate_fipo_args(_args(**flags))
        with pytest.raises(ValueError, match="--fipo-allow-single-step where"):
            validate_fipo_args(_args(**{**flags, "fipo_allow_single_step": None}))
    for flags in (single, from_train):
        with pytest.raises(ValueError, match="--fipo-allow-single-step helps only"):
            validate_fipo_args(_args(**flags))


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
        ({"fipo_shift_from": "train", "use_rollout_logprobs": True}, "--get-mismatch-metrics"),
        ({"loss_type": "policy_loss", "fipo_decay_rate": 8.0}, "--fipo-decay-rate needs --loss-type fipo_loss"),
    ],
)
def test_validation_names_the_flag(flags, message):
    with pytest.raises(ValueError, match=message):
        validate_fipo_args(_args(**flags))


@pytest.mark.unit
def test_missing_old_log_probs_are_refused(monkeypatch):
    batch, policy = _batch(_samples())
    batch["log_probs"] = None
    monkeypatch.setattr(slime_loss, "get_log_probs_and_entropy", _log_probs_of(policy))
    with pytest.raises(ValueError, match="log_probs"):
        slime_loss.loss_function(_validated(), batch, 1, len(RESPONSES), torch.zeros(1, 1, 1))


def _cp_worker(rank, world_size, port, path):
    group = _cp_dist_helpers.init_worker_process_group(rank, world_size, port)
    groups = {1: dist.new_group([0]), 2: dist.new_group([0, 1]), 4: group}
    try:
        results = {cp_size: _cp_results(rank, cp_size, groups[cp_size]) for cp_size in groups if rank < cp_size}
        if rank == 0:
            torch.save(results, path)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _cp_results(rank, cp_size, group):
    """Loss and metrics of policy_loss_function summed over the CP group, and the whole gradient, for all settings."""
    _cp_dist_helpers.stub_megatron_in_worker(cp_size, rank)
    slime_loss.mpu.get_context_parallel_group = lambda: group
    slice_fn = _cp_dist_helpers.cp_chunk_response_tensor if cp_size > 1 else lambda tensor, *_: tensor
    results = {}
    with torch.compiler.set_stance("force_eager"):
        for name, settings in SETTINGS.items():
            samples = _samples()
            batch, policy = _batch(samples, slice_fn)
            slime_loss.get_log_probs_and_entropy = _log_probs_of(policy)
            lengths = (samples["total_lengths"], samples["response_lengths"])
            reducer = get_sum_of_sample_mean(*lengths, samples["loss_masks"], batch["rollout_mask_sums"])
            args = _validated(fipo_log_detail=True, **_as_flags(settings))
            loss, metrics = slime_loss.policy_loss_function(args, batch, torch.zeros(1, 1, 1), reducer)
            loss.backward()
            grads = zip((log_probs.grad for log_probs in policy), *lengths, strict=True)
            grad = torch.cat([all_gather_with_cp(*tensors) for tensors in grads])
            values = torch.stack([value.double() for value in metrics.values()])
            dist.all_reduce(values, group=group)
            results[name] = {"grad": grad, **dict(zip(metrics, values, strict=True))}
    return results


def _as_flags(settings):
    flags = {f"fipo_{name}": "none" if value is None else value for name, value in settings.items()}
    if "fipo_clip_influence" in flags:
        flags["fipo_unclipped"] = not flags.pop("fipo_clip_influence")
    return flags


@pytest.mark.unit
def test_loss_gradient_and_metrics_are_cp_invariant(tmp_path):
    path = tmp_path / "results.pt"
    mp.spawn(_cp_worker, (4, _cp_dist_helpers.free_port(), path), nprocs=4)
    results = torch.load(path, weights_only=True)

    for cp_size in (2, 4):
        for name, expected in results[1].items():
            for key, value in expected.items():
                actual = results[cp_size][name][key]
                torch.testing.assert_close(actual, value, rtol=1e-9, atol=1e-12, msg=f"CP {cp_size}, {name}, {key}")
    assert {"grad", "loss", "pg_clipfrac", "fipo/future_kl"} <= results[1]["defaults"].keys()
    assert results[1]["defaults"]["fipo/dropped_frac"] > 0


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
