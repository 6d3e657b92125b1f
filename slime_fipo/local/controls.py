"""Placebos for FIPO's influence weights: the same numbers, without what they say about a token.

If training with weights that lie on the wrong tokens goes as well as with the right ones, what helped was not credit.
These exist in the embedded engine only, for ``slime-fipo compare``; no flag of the product reaches them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from slime_fipo.algorithm import FipoConfig, FipoWeights


def unit_weights(dual_clip_c: float | None) -> FipoConfig:
    """Settings at which every weight is 1, so that the loss is PPO's own and the metrics say what Future-KL was."""
    return FipoConfig(
        clip_ratio_low=0.0,
        clip_ratio_high=0.0,
        safety_thresh=None,
        dual_clip_c=dual_clip_c,
        max_dual_clipped_tokens=None,
    )


def _shuffle(weights: Tensor, generator: torch.Generator) -> Tensor:
    return weights[torch.randperm(len(weights), generator=generator, device=weights.device)]


def _shuffled_in_response(weights: Tensor, lengths: list[int], generator: torch.Generator) -> Tensor:
    return torch.cat([_shuffle(part, generator) for part in weights.split(lengths)])


def _shuffled_in_batch(weights: Tensor, lengths: list[int], generator: torch.Generator) -> Tensor:
    return _shuffle(weights, generator)


def _batch_mean(weights: Tensor, lengths: list[int], generator: torch.Generator) -> Tensor:
    return weights.mean().expand_as(weights)


# Each: (weights [T], response lengths that add up to T, generator) -> weights [T].
CONTROLS: dict[str, Callable[[Tensor, list[int], torch.Generator], Tensor]] = {
    "shuffled-in-response": _shuffled_in_response,  # each response keeps its weights, in random order
    "shuffled-in-batch": _shuffled_in_batch,  # the step keeps its weights, on random tokens
    "batch-mean": _batch_mean,  # every token of the step has their mean
}


def controlled_weights(
    name: str, fipo: FipoWeights, loss_mask: Tensor, lengths: list[int], generator: torch.Generator
) -> FipoWeights:
    """FIPO's weights of one optimizer step with a control in their place.

    Only trained tokens of responses that the sequence filter kept take part, so the filter's decisions stay as they
    are: the control moves weights and nothing else.

    Args:
        name: key of :data:`CONTROLS`.
        fipo: with ``influence_weight`` and ``influence_deviation`` among its metrics.
        loss_mask: [T], non-zero where a token is trained.
        lengths: response lengths that add up to T.
        generator: of the order; on the tensors' device.

    Returns:
        ``fipo`` with other ``weights`` [T] and the two metrics that describe them.
    """
    kept = fipo.keep.repeat_interleave(torch.tensor(lengths, device=fipo.keep.device))
    takes_part = kept & (loss_mask != 0)
    counts = [int(part.sum()) for part in takes_part.split(lengths)]
    weights = fipo.weights.clone()
    weights[takes_part] = CONTROLS[name](fipo.weights[takes_part], counts, generator)
    influence = torch.where(takes_part, weights, fipo.metrics["influence_weight"])
    described = {"influence_weight": influence, "influence_deviation": (influence - 1).abs()}
    return replace(fipo, weights=weights, metrics=fipo.metrics | described)
