"""Functions that a slime user could name in a ``--custom-…-path`` flag."""

import torch
from slime.backends.megatron_utils import cp_utils


def rejecting_tis(
    args, *, pg_loss, train_log_probs, rollout_log_probs, loss_masks, total_lengths, response_lengths, **_
):
    """Truncated importance weights, and every fifth token rejected from the masks."""
    ratio = (torch.cat(train_log_probs) - torch.cat(rollout_log_probs)).exp()
    masks = [mask * (torch.arange(mask.numel()) % 5 != 4) for mask in loss_masks]
    return pg_loss * ratio.clamp(0.9, 1.1), masks, {"rejecting_tis": ratio}


def constant_length_reducer(total_lengths, response_lengths, loss_masks, calculate_per_token_loss):
    """Dr. GRPO's: a constant in place of each response's length."""
    constant = [torch.tensor(40.0)] * len(loss_masks)
    return cp_utils.get_sum_of_sample_mean(total_lengths, response_lengths, loss_masks, constant)


def record_step(args, rollout_id, step_id, model, optimizer, opt_param_scheduler):
    """A user's own before-train-step hook."""
    args.recorded_step = (rollout_id, step_id, model, optimizer, opt_param_scheduler)
