"""The FIPO loss for slime's Megatron trainer: slime's own ``policy_loss_function`` with one weight per token.

slime loads the three public functions here by their import path, in its training actors. No part of slime's loss is
copied, and slime's modules are not changed. Settings and their checks live in ``arguments.py``, the weights in
``slime_fipo.algorithm``, records of what the loss saw in ``recorder.py``.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from itertools import pairwise
from types import FunctionType

import torch
from megatron.core import mpu
from slime.backends.megatron_utils import cp_utils
from slime.backends.megatron_utils import loss as slime_loss
from slime.utils.misc import load_function
from torch import Tensor

from ..algorithm import FipoConfig, FipoWeights, fipo_weights
from ..algorithm.context_parallel import ContextParallel, chunk_edges
from ..algorithm.weights import METRICS
from ..records.packed import RECORDED_METRICS
from .arguments import fipo_settings, is_on, shift_is_apart
from .engine_noise import EngineNoise
from .recorder import is_main_rank, recorder_of_step

DEFAULT_METRICS = (
    "future_kl",
    "influence_weight",
    "influence_deviation",
    "clip_high_frac",
    "clip_low_frac",
    "dropped_frac",
)

Reducer = Callable[[Tensor], Tensor]

engine_noise = EngineNoise()


def check_slime() -> None:
    """Refuse a slime whose loss path lacks what this module relies on.

    Raises:
        ImportError: names what is missing, and the slime versions that have it.
    """
    wanted = {
        slime_loss: ("policy_loss_function", "compute_policy_loss"),
        cp_utils: ("get_logits_and_tokens_offset_with_cp", "slice_log_prob_with_cp"),
    }
    missing = [f"{m.__name__}.{name}" for m, names in wanted.items() for name in names if not hasattr(m, name)]
    if not missing and not _calls_compute_policy_loss(slime_loss.policy_loss_function):
        missing = [f"a call of compute_policy_loss in {slime_loss.__name__}.policy_loss_function"]
    if missing:
        raise ImportError(
            f"this slime lacks {' and '.join(missing)}, where FIPO's weights go; slime v0.3.0, v0.3.1 and main 624b824a"
            " have it"
        )


def _calls_compute_policy_loss(function) -> bool:
    return isinstance(function, FunctionType) and "compute_policy_loss" in function.__code__.co_names


check_slime()


def fipo_loss_function(args: Namespace, batch: dict, logits: Tensor, sum_of_sample_mean: Reducer):
    """slime's ``policy_loss`` with FIPO's weight on each token (arXiv:2603.19835, Eq. 8).

    The weight meets the per-token loss where slime multiplies OPSM's mask, so TIS, custom reducers, KL and entropy
    terms follow it unchanged. Under context parallelism this calls one collective more than ``policy_loss``, on every
    rank of the group.

    Args:
        args: slime's namespace; FIPO's settings are its ``fipo_*`` attributes, or their defaults.
        batch: slime's micro-batch; per-token lists are CP-local, ``loss_masks`` and lengths those of whole
            responses.
        logits: [1, T, V / TP], float32.
        sum_of_sample_mean: slime's reducer for packed per-token tensors.

    Returns:
        ``(loss, metrics)``: scalars; slime's own metrics and ours under ``fipo/``.

    Raises:
        ValueError: settings that do not fit slime's, or a batch without the old log-probs that they ask for.
    """
    config = fipo_settings(args)
    _check_batch(args, batch)
    loss_mask, lengths, cp = _layout(args, batch, config)
    log_shift_noise = _shift_is_engine_mismatch(args)
    logged = METRICS if is_on(args, "fipo_log_detail") else DEFAULT_METRICS
    recorder = recorder_of_step(args)
    held = recorder.held(batch["unconcat_tokens"]) if recorder is not None else []
    # Future-KL is in the result anyway; as a metric it would be a copy.
    computed = {*logged, *(RECORDED_METRICS if held else ())} - {"future_kl"}
    result: FipoWeights | None = None

    def weighted_policy_loss(ppo_kl: Tensor, advantages: Tensor, *clips, **options):
        nonlocal result
        # Whatever slime passes goes on, but for the dual clip: its fifth parameter, which older releases leave out.
        if len(clips) > 2:
            clips = (*clips[:2], config.dual_clip_c, *clips[3:])
        else:
            options["eps_clip_c"] = config.dual_clip_c
        pg_loss, clipfrac = slime_loss.compute_policy_loss(ppo_kl, advantages, *clips, **options)
        shift, old = -ppo_kl.detach(), ppo_kl.new_zeros(()).expand_as(ppo_kl)
        if shift_is_apart(args):
            shift, old = shift + torch.cat(batch["rollout_log_probs"]), torch.cat(batch["log_probs"])
        result = fipo_weights(shift, old, advantages, loss_mask, lengths, config, cp=cp, metrics=computed)
        if held:
            seen = {"loss_mask": loss_mask, "shift": shift - old, "advantages": advantages}
            seen.update((name, _metric(result, name)) for name in RECORDED_METRICS)
            seen.update(_mismatch(args, batch, seen["shift"]))
            recorder.add(held, batch["unconcat_tokens"], lengths, cp, seen)
        return pg_loss * result.weights, clipfrac

    loss, metrics = _policy_loss_function(weighted_policy_loss)(args, batch, logits, sum_of_sample_mean)
    if result is None:
        raise RuntimeError("slime's policy_loss_function did not call compute_policy_loss; something else replaced it")
    values = {name: _metric(result, name) for name in logged}
    if log_shift_noise:
        values["mismatch_future_kl_abs"] = result.future_kl.abs()
        values["mismatch_clip_frac"] = values["clip_high_frac"] + values["clip_low_frac"]
    means = {name: sum_of_sample_mean(value) for name, value in values.items()}
    if log_shift_noise and is_main_rank():
        engine_noise.add(means["mismatch_clip_frac"], sum_of_sample_mean(torch.ones_like(result.weights)))
    metrics.update((f"fipo/{name}", mean) for name, mean in means.items())
    return loss, metrics


def _metric(result: FipoWeights, name: str) -> Tensor:
    return result.future_kl if name == "future_kl" else result.metrics[name]


def _policy_loss_function(compute_policy_loss: Callable) -> Callable:
    """slime's ``policy_loss_function`` with the global name ``compute_policy_loss`` bound to another function.

    A new function over the same code: slime's module stays as it is, so that its own policy loss, a second call, and
    a recomputation under activation checkpointing cannot meet a half-replaced name.
    """
    original = slime_loss.policy_loss_function
    names = {**original.__globals__, "compute_policy_loss": compute_policy_loss}
    function = FunctionType(original.__code__, names, original.__name__, original.__defaults__, original.__closure__)
    function.__kwdefaults__ = original.__kwdefaults__
    return function


def _check_batch(args: Namespace, batch: dict) -> None:
    if args.use_rollout_logprobs and not batch.get("rollout_log_probs"):
        raise ValueError(
            "--use-rollout-logprobs asks for the rollout engine's log-probs, but the rollout returned none: let the"
            " rollout function fill sample.rollout_log_probs, or drop --use-rollout-logprobs"
        )
    if (not args.use_rollout_logprobs or shift_is_apart(args)) and not batch.get("log_probs"):
        raise ValueError(
            "the batch has no log_probs of the policy before this rollout's steps, so FIPO has no shift: let slime"
            " recompute them (--loss-type fipo_loss or custom_loss does), or add --use-rollout-logprobs"
        )


def _layout(args: Namespace, batch: dict, config: FipoConfig) -> tuple[Tensor, list[int], ContextParallel | None]:
    """This rank's loss mask [T] and tokens per response [B], and how responses are spread over the CP group."""
    cp_size = mpu.get_context_parallel_world_size()
    if cp_size == 1:
        return torch.cat(batch["loss_masks"]), batch["response_lengths"], None

    local_masks, chunk_lengths = [], []
    padded = batch.get("max_seq_lens") if getattr(args, "qkv_format", "thd") == "bshd" else None
    for i, mask in enumerate(batch["loss_masks"]):
        sizes = (batch["total_lengths"][i], batch["response_lengths"][i])
        if padded is not None:  # v0.3.0 can cut sequences padded to one length instead of packed ones
            sizes += ("bshd", padded[i])
        total, response = sizes[:2]
        chunk_size = cp_utils.get_logits_and_tokens_offset_with_cp(*sizes)[0]
        edges = chunk_edges(total, response, chunk_size, cp_size)
        chunk_lengths.append([end - start for start, end in pairwise(edges)])
        local_masks.append(cp_utils.slice_log_prob_with_cp(mask, *sizes))

    whole_mask = torch.cat(batch["loss_masks"]) if config.decay_over == "trained_tokens" else None
    cp = ContextParallel(mpu.get_context_parallel_group(), chunk_lengths, whole_mask)
    return torch.cat(local_masks), [mask.numel() for mask in local_masks], cp


def _shift_is_engine_mismatch(args: Namespace) -> bool:
    """At a rollout's first step the policy has not moved: against SGLang's log-probs, the shift is engine noise."""
    return getattr(args, "fipo_step_id", None) == 0 and args.use_rollout_logprobs and not shift_is_apart(args)


def _mismatch(args: Namespace, batch: dict, shift: Tensor) -> dict[str, Tensor]:
    """The trainer's minus the rollout engine's log-probs [T] as ``mismatch``, where both are known."""
    if batch.get("log_probs") and batch.get("rollout_log_probs"):
        return {"mismatch": torch.cat(batch["log_probs"]) - torch.cat(batch["rollout_log_probs"])}
    return {"mismatch": shift} if _shift_is_engine_mismatch(args) else {}


def before_train_step_hook(args: Namespace, rollout_id: int, step_id: int, *rest, **keywords) -> None:
    """For ``--custom-megatron-before-train-step-hook-path``: tells the loss which step of the rollout comes next.

    ``python3 -m slime_fipo`` sets it, and has it call the user's own hook. Without it the ``fipo/mismatch_*`` metrics
    are not reported, and nothing warns of engine noise.
    """
    args.fipo_step_id = step_id
    engine_noise.report(args)
    chained = getattr(args, "fipo_chained_hook_path", None)
    if chained:
        load_function(chained)(args, rollout_id, step_id, *rest, **keywords)


def mismatch_metrics_function(
    args: Namespace,
    *,
    pg_loss: Tensor,
    train_log_probs: list[Tensor],
    rollout_log_probs: list[Tensor],
    loss_masks: list[Tensor],
    **context,
) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    """For ``--custom-tis-function-path`` with ``--get-mismatch-metrics``: measures the engines, changes no loss.

    Whatever else slime tells such a function in ``context`` (lengths, say) has no part in a difference of log-probs.

    Returns:
        The loss and masks as they came, and per-token ``mismatch_kl`` (rollout − trainer log-prob, the k1 estimate of
        KL(rollout ‖ trainer)) and ``mismatch_k3_kl``.
    """
    log_ratio = torch.cat(train_log_probs) - torch.cat(rollout_log_probs)
    return pg_loss, loss_masks, {"mismatch_kl": -log_ratio, "mismatch_k3_kl": log_ratio.exp() - 1 - log_ratio}
