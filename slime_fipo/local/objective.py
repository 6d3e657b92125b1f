"""The loss of one optimizer step: the objective of ``slime_fipo.algorithm``, reduced as slime reduces it.

Batches have slime's data shapes, metrics slime's names.
"""

from __future__ import annotations

import argparse

import torch
from megatron.core.models.gpt import GPTModel

from slime_fipo.algorithm import fipo_policy_loss, fipo_weights

from .controls import controlled_weights, unit_weights
from .model import packed_logits
from .random_streams import CONTROL, seeded_generator
from .recording import Recorder
from .train_data import response_log_probs


def reduce_tokens(values: torch.Tensor, loss_masks: list[torch.Tensor], per_token: bool) -> torch.Tensor:
    """Mean over samples of each sample's mean over its trained tokens, or the mean over all trained tokens.

    Args:
        values: [T], packed.
        loss_masks: one [response length] per sample, T elements together.
        per_token: slime's ``--calculate-per-token-loss``.
    """
    lengths = [len(mask) for mask in loss_masks]
    if per_token:
        mask = torch.cat(loss_masks)
        return (values * mask).sum() / mask.sum().clamp_min(1)
    means = [
        (part * mask).sum() / mask.sum().clamp_min(1)
        for part, mask in zip(values.split(lengths), loss_masks, strict=True)
    ]
    return torch.stack(means).mean()


def policy_objective(
    args: argparse.Namespace, batch: dict[str, list], logits: torch.Tensor, recorder: Recorder | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """FIPO's policy loss (``--loss-type policy_loss``: with every weight at 1), reduced as slime reduces it.

    Args:
        args: ``fipo`` holds the effective settings, ``weight_control`` what takes the weights' place; the clip range
            and the reduction are slime's flags.
        batch: one step's samples.
        logits: [1, sum of total lengths, vocabulary], packed.
        recorder: is shown the batch, the shift [T] and FIPO's weights, and leaves all three as they are.

    Returns:
        The loss to minimise, and detached scalars by name: slime's under ``train/``, FIPO's under ``fipo/``.
        FIPO's are averaged over trained tokens whatever the loss's own reduction.
    """
    log_probs, entropy = response_log_probs(logits, batch, args.rollout_temperature)
    old_log_probs = torch.cat(batch["rollout_log_probs" if args.use_rollout_logprobs else "log_probs"])
    advantages, masks = torch.cat(batch["advantages"]), batch["loss_masks"]
    tokens = (log_probs, old_log_probs, advantages, torch.cat(masks), batch["response_lengths"])
    clip = {"eps_clip": args.eps_clip, "eps_clip_high": args.eps_clip_high}
    if args.weight_control is None:
        per_token_loss, fipo = fipo_policy_loss(*tokens, args.fipo, **clip)
    else:
        per_token_loss, _ = fipo_policy_loss(*tokens, unit_weights(args.fipo.dual_clip_c), **clip)
        place = (batch["rollout_id"][0], batch["rollout_position"][0])
        generator = seeded_generator(log_probs.device, args.seed, CONTROL, *place, args.sampling_stream)
        fipo = controlled_weights(args.weight_control, fipo_weights(*tokens, args.fipo), *tokens[3:], generator)
        per_token_loss = per_token_loss * fipo.weights
    loss = reduce_tokens(per_token_loss, masks, args.calculate_per_token_loss)

    with torch.no_grad():
        shift = log_probs - old_log_probs
        if recorder is not None:
            recorder(batch, shift, fipo)
        ratio = shift.exp()
        clipped = torch.where(advantages > 0, ratio > 1 + args.eps_clip_high, ratio < 1 - args.eps_clip)
        engine_log_probs = log_probs if args.use_rollout_logprobs else old_log_probs
        per_token = {
            "train/entropy_loss": entropy,
            "train/pg_clipfrac": (clipped & (advantages != 0)).float(),
            "train/ppo_kl": -shift,
            "train/train_rollout_logprob_abs_diff": (engine_log_probs - torch.cat(batch["rollout_log_probs"])).abs(),
        }
        metrics = {
            name: reduce_tokens(values, masks, args.calculate_per_token_loss) for name, values in per_token.items()
        }
        metrics |= {f"fipo/{name}": reduce_tokens(values, masks, True) for name, values in fipo.metrics.items()}
    return loss, {"train/loss": loss.detach()} | metrics


def policy_step(
    args: argparse.Namespace, model: GPTModel, batch: dict[str, list], recorder: Recorder | None = None
) -> dict[str, torch.Tensor]:
    """Forward and backward of one optimizer step; returns :func:`policy_objective`'s metrics."""
    loss, metrics = policy_objective(args, batch, packed_logits(model, batch["tokens"]), recorder)
    loss.backward()
    return metrics
