"""From rewarded groups to training batches in slime's data shapes: per-sample lists, and steps as slices of them.

A batch is a dict with slime's keys: ``tokens``, ``total_lengths``, ``response_lengths``, ``loss_masks``,
``rollout_log_probs``, ``log_probs``, ``advantages``, and what only recording reads: ``raw_reward``, ``rollout_id`` and
``rollout_position``. Nothing here knows which loss will read it.
"""

from __future__ import annotations

import argparse

import torch
from megatron.core.models.gpt import GPTModel

from .model import packed_logits
from .rollout import Sample

LOG_PROB_BATCH = 256  # sequences per forward pass without gradient


def group_advantages(args: argparse.Namespace, groups: list[list[Sample]]) -> list[float]:
    """GRPO, one per sample: the reward minus its group's mean, over the group's standard deviation (slime's 1e-6)."""
    rewards = torch.tensor([[sample.reward for sample in group] for group in groups])
    if args.rewards_normalization:
        rewards = rewards - rewards.mean(dim=-1, keepdim=True)
        if args.grpo_std_normalization:
            rewards = rewards / (rewards.std(dim=-1, keepdim=True) + 1e-6)
    return rewards.flatten().tolist()


def make_rollout_batch(
    args: argparse.Namespace, model: GPTModel, groups: list[list[Sample]], device: torch.device, rollout_id: int
) -> dict[str, list]:
    """The whole rollout as one batch, with the trainer's own old log-probs (before the rollout's first step)."""
    samples = [sample for group in groups for sample in group]
    lengths = [sample.response_length for sample in samples]
    batch = {
        "tokens": [torch.tensor(sample.tokens, device=device) for sample in samples],
        "total_lengths": [len(sample.tokens) for sample in samples],
        "response_lengths": lengths,
        "loss_masks": [torch.ones(n, dtype=torch.int, device=device) for n in lengths],
        "rollout_log_probs": [torch.tensor(sample.rollout_log_probs, device=device) for sample in samples],
        "advantages": [
            torch.full((n,), a, device=device) for n, a in zip(lengths, group_advantages(args, groups), strict=True)
        ],
        "raw_reward": [sample.reward for sample in samples],
        "rollout_id": [rollout_id] * len(samples),
        "rollout_position": list(range(len(samples))),
    }
    batch["log_probs"] = []
    model.eval()
    with torch.no_grad():
        for i in range(0, len(samples), LOG_PROB_BATCH):
            part = select(batch, range(i, min(i + LOG_PROB_BATCH, len(samples))))
            log_probs, _ = response_log_probs(packed_logits(model, part["tokens"]), part, args.rollout_temperature)
            batch["log_probs"] += log_probs.split(part["response_lengths"])
    return batch


def select(batch: dict[str, list], indices) -> dict[str, list]:
    """The batch's samples at ``indices``."""
    return {key: [values[i] for i in indices] for key, values in batch.items() if values}


def response_log_probs(
    logits: torch.Tensor, batch: dict[str, list], temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of the response tokens, and the entropy of the distribution at each.

    Args:
        logits: [1, sum of total lengths, vocabulary], packed.
        batch: gives ``tokens``, ``total_lengths``, ``response_lengths``.

    Returns:
        Both [sum of response lengths], packed in the batch's order.
    """
    tokens, rows, offset = torch.cat(batch["tokens"]), [], 0
    for total, response in zip(batch["total_lengths"], batch["response_lengths"], strict=True):
        offset += total
        rows.append(torch.arange(offset - response, offset, device=logits.device))
    targets = torch.cat(rows)
    log_softmax = (logits[0, targets - 1].float() / temperature).log_softmax(-1)  # the logits before a token predict it
    log_probs = log_softmax.gather(1, tokens[targets, None]).squeeze(1)
    entropy = -(log_softmax.exp() * log_softmax).sum(-1)
    return log_probs, entropy
