"""FIPO's weights for a micro-batch: its tensors in slime's layout, and its metrics through slime's reducer.

The objective itself, its settings and its flags are in ``slime/utils/fipo.py``.
"""

from argparse import Namespace
from collections.abc import Callable
from itertools import pairwise

import torch
from megatron.core import mpu

from slime.utils.fipo import METRICS, ContextParallel, FipoConfig, fipo_config_from_args, fipo_weights, shift_is_apart
from slime.utils.types import RolloutBatch

from .cp_utils import get_logits_and_tokens_offset_with_cp, slice_log_prob_with_cp

#: plugin.loss DEFAULT_METRICS


def compute_fipo_weights(
    args: Namespace,
    batch: RolloutBatch,
    ppo_kl: torch.Tensor,
    advantages: torch.Tensor,
    sum_of_sample_mean: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Compute FIPO's weight for every token.

    Under context parallelism this calls one all-gather of three floats per response, on every rank of the group.

    Args:
        args: Configuration, as ``validate_fipo_args`` leaves it, and ``fipo_step_id``, the step within the rollout.
        batch: Micro-batch with "loss_masks", "total_lengths" and "response_lengths" of whole responses, and CP-local
            "log_probs" and "rollout_log_probs".
        ppo_kl: Packed CP-local old minus new log-probs, shape `[T]`.
        advantages: Packed CP-local advantages, shape `[T]`.
        sum_of_sample_mean: Reduction function for packed per-token tensors.

    Returns:
        Tuple of `(weights, metrics)`: detached weights with shape `[T]`, to multiply onto the per-token policy loss,
        and reduced metrics under "fipo/".

    Raises:
        ValueError: a batch without the old log-probs that the shift is measured from.
    """
    config = fipo_config_from_args(args)
    shift_apart = shift_is_apart(args)
    if (shift_apart or not args.use_rollout_logprobs) and not batch.get("log_probs"):
        raise ValueError("the batch has no log_probs of the policy before this rollout's steps, so FIPO has no shift")
    log_ratio = -ppo_kl.detach()
    if shift_apart:
        log_ratio = log_ratio + torch.cat(batch["rollout_log_probs"]) - torch.cat(batch["log_probs"])

    loss_mask, lengths, cp = _layout(batch, config)
    names = METRICS if args.fipo_log_detail else DEFAULT_METRICS
    result = fipo_weights(log_ratio, advantages, loss_mask, lengths, config, cp=cp, metrics=names)

    values = dict(result.metrics)
    # At a rollout's first step the trainer has not moved yet, so against SGLang's log-probs the shift is what the
    # engines disagree by (and, with train_async.py, the weight updates that the rollout is behind).
    if args.fipo_step_id == 0 and args.use_rollout_logprobs and not shift_apart:
        values["mismatch_future_kl_abs"] = result.future_kl.abs()
        values["mismatch_clip_frac"] = values["clip_high_frac"] + values["clip_low_frac"]
    return result.weights, {f"fipo/{name}": sum_of_sample_mean(value) for name, value in values.items()}


def _layout(batch: RolloutBatch, config: FipoConfig) -> tuple[torch.Tensor, list[int], ContextParallel | None]:
    """This rank's packed loss mask and tokens per response, and how responses are spread over the CP group."""
    cp_size = mpu.get_context_parallel_world_size()
    if cp_size == 1:
        return torch.cat(batch["loss_masks"]), batch["response_lengths"], None

    local_masks, chunk_lengths = [], []
    for mask, total, response in zip(
        batch["loss_masks"], batch["total_lengths"], batch["response_lengths"], strict=True
    ):
        chunk_size = get_logits_and_tokens_offset_with_cp(total, response)[0]
        first = total - response - 1  # position of the logit that predicts the first response token
        edges = [min(max(k * chunk_size - first, 0), response) for k in range(2 * cp_size + 1)]
        chunk_lengths.append([end - start for start, end in pairwise(edges)])
        local_masks.append(slice_log_prob_with_cp(mask, total, response))

    whole_mask = torch.cat(batch["loss_masks"]) if config.decay_over == "trained_tokens" else None
    cp = ContextParallel(mpu.get_context_parallel_group(), chunk_lengths, whole_mask)
    return torch.cat(local_masks), [mask.numel() for mask in local_masks], cp
