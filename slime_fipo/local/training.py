"""Optimizer steps: supervised on demonstrations, then on rollouts.

Which rollouts and how many is the engine's business; what a step's loss is, ``objective.py``'s.
"""

from __future__ import annotations

import argparse
import math

import torch
from megatron.core.models.gpt import GPTModel

from .data import END, Alphabet, Record
from .model import diverged, packed_logits
from .objective import policy_step, reduce_tokens
from .recording import Recorder
from .train_data import response_log_probs, select

WARMUP_STEPS = 20  # of base training


def make_optimizer(args: argparse.Namespace, model: GPTModel, lr: float) -> torch.optim.AdamW:
    """Torch's Adam: Megatron-Core's optimizers allocate on CUDA."""
    return torch.optim.AdamW(
        model.parameters(), lr=lr, betas=(args.adam_beta1, args.adam_beta2), weight_decay=args.weight_decay
    )


def apply_gradient(args: argparse.Namespace, model: GPTModel, optimizer: torch.optim.Optimizer) -> float:
    """Clip, step, clear. Returns the gradient norm before clipping.

    Raises:
        UserError: the gradient is not finite.
    """
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad or math.inf).item()
    if not math.isfinite(norm):
        raise diverged(f"gradient norm {norm}")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def demonstration_batch(records: list[Record], alphabet: Alphabet, device: torch.device) -> dict[str, list]:
    """Demonstrations in the shapes of a rollout's batch; every response ends with ``END``."""
    batch = {"tokens": [], "total_lengths": [], "response_lengths": [], "loss_masks": []}
    for record in records:
        prompt, response = alphabet.encode(record.prompt), [*alphabet.encode(record.target), END]
        batch["tokens"].append(torch.tensor(prompt + response, device=device))
        batch["total_lengths"].append(len(prompt) + len(response))
        batch["response_lengths"].append(len(response))
        batch["loss_masks"].append(torch.ones(len(response), device=device))
    return batch


def demonstration_lr(args: argparse.Namespace, step: int) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    warmup = min(WARMUP_STEPS, args.demo_steps)
    if step < warmup:
        return args.demo_lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, args.demo_steps - warmup)
    return args.demo_lr * (0.55 + 0.45 * math.cos(math.pi * progress))


def demonstration_step(
    args: argparse.Namespace, model: GPTModel, optimizer: torch.optim.Optimizer, batch: dict[str, list], step: int
) -> dict[str, float]:
    """One supervised step on the response tokens."""
    model.train()
    for group in optimizer.param_groups:
        group["lr"] = demonstration_lr(args, step)
    log_probs, _ = response_log_probs(packed_logits(model, batch["tokens"]), batch, temperature=1.0)
    loss = -reduce_tokens(log_probs, batch["loss_masks"], per_token=True)
    loss.backward()
    grad_norm = apply_gradient(args, model, optimizer)
    return {"demo/loss": loss.item(), "demo/grad_norm": grad_norm, "demo/lr": demonstration_lr(args, step)}


def train_on_rollout(
    args: argparse.Namespace,
    model: GPTModel,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, list],
    recorder: Recorder | None = None,
) -> dict[str, float]:
    """One pass over a rollout in steps of ``--global-batch-size`` samples.

    Returns:
        :func:`policy_step`'s metrics and the gradient norm, averaged over the steps. At a rollout's first step the
        policy has not moved yet, so what measures its drift is zero there and counts as such.
    """
    model.train()
    steps = []
    for start in range(0, len(batch["tokens"]), args.global_batch_size):
        step = select(batch, range(start, start + args.global_batch_size))
        metrics = policy_step(args, model, step, recorder)
        grad_norm = apply_gradient(args, model, optimizer)
        steps.append({name: value.item() for name, value in metrics.items()} | {"train/grad_norm": grad_norm})
    return {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}
