"""One rollout step's worth of data for slime's loss, whole and as a rank of any parallel layout sees it.

Everything derives from full logits [sum of total lengths, V] and from log-probs computed here with plain torch, so that
what slime computes can be checked against something that is not slime.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from megatron.core import mpu
from slime.backends.megatron_utils import cp_utils
from torch import Tensor

VOCABULARY = 32

# (prompt length, response length, advantage, ratios at chosen tokens, masked spans)
RESPONSES = (
    (7, 33, 1.0, {}, ()),
    (5, 1, -0.7, {}, ()),
    (9, 0, 0.5, {}, ()),
    (3, 64, -1.2, {10: 2.5, 40: 3.5}, ((12, 30), (50, 51))),  # tool results between two turns
    (120, 6, 0.9, {}, ()),  # most context-parallel ranks hold no response token
    (4, 41, -0.8, {2: 15.0, 37: 12.0}, ()),  # two dual-clipped tokens, far apart: dropped
    (6, 29, -0.8, {28: 15.0}, ()),  # one dual-clipped token: kept
    (11, 17, 0.3, {}, ((0, 17),)),  # fully masked
    (2, 25, -1.0, {5: 4.5, 9: 6.0, 20: 8.0}, ()),
    (8, 51, 0.6, {3: 20.0}, ((7, 8),)),  # an excluded token with a positive advantage
)
# Responses that fit into the last chunk of their sequence: with context parallelism, rank 0 alone holds any.
PROMPT_HEAVY = ((120, 3, -1.0, {0: 15.0, 2: 12.0}, ()), (90, 2, 0.5, {}, ()))
NO_RESPONSE = ((6, 0, 1.0, {}, ()), (9, 0, -1.0, {}, ()))


@dataclass
class Samples:
    """All samples of a step; lists hold one tensor per sample, of whole responses."""

    logits: Tensor  # [sum of total lengths, V]
    tokens: list[Tensor]
    prompts: list[int]
    responses: list[int]
    advantages: list[Tensor]
    loss_masks: list[Tensor]
    log_probs: list[Tensor] = field(default_factory=list)  # of the current policy, from plain torch
    train_log_probs: list[Tensor] = field(default_factory=list)
    rollout_log_probs: list[Tensor] = field(default_factory=list)
    ref_log_probs: list[Tensor] = field(default_factory=list)
    top_p_ids: list[Tensor] | None = None
    top_p_offsets: list[Tensor] | None = None

    @property
    def totals(self) -> list[int]:
        return [p + r for p, r in zip(self.prompts, self.responses, strict=True)]


def make_samples(
    responses=RESPONSES, *, seed: int = 0, temperature: float = 1.0, top_p: bool = False, shift_in_rollout: bool = False
) -> Samples:
    """Samples whose old log-probs differ from the current policy's by the shifts that ``responses`` ask for.

    Args:
        shift_in_rollout: measure those shifts from the rollout engine's log-probs instead of the trainer's; the
            other of the two differs by engine noise.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    prompts, lengths = [r[0] for r in responses], [r[1] for r in responses]
    totals = [p + n for p, n in zip(prompts, lengths, strict=True)]
    samples = Samples(
        logits=2.0 * randn(sum(totals), VOCABULARY),
        tokens=[torch.randint(VOCABULARY, (n,), generator=generator) for n in totals],
        prompts=prompts,
        responses=lengths,
        advantages=[a * (1 + 0.1 * randn(n)) for (_, n, a, _, _) in responses],
        loss_masks=[torch.ones(n, dtype=torch.int) for n in lengths],
    )
    for mask, (*_, spans) in zip(samples.loss_masks, responses, strict=True):
        for start, stop in spans:
            mask[start:stop] = 0
    if top_p:
        samples.top_p_ids, samples.top_p_offsets = [], []
        for i, n in enumerate(lengths):
            kept = torch.rand(n, VOCABULARY, generator=generator) < 0.5
            kept[torch.arange(n), samples.tokens[i][prompts[i] :]] = True
            samples.top_p_ids.append(kept.nonzero()[:, 1].int())
            samples.top_p_offsets.append(torch.cat([torch.zeros(1), kept.sum(1).cumsum(0)]).int())

    samples.log_probs = reference_log_probs(samples, samples.logits, temperature)
    for now, (_, n, _, ratios, _) in zip(samples.log_probs, responses, strict=True):
        drift = 0.05 * randn(n) + 0.03 * randn(1)  # a common part: Future-KL of long responses leaves the clip range
        for position, ratio in ratios.items():
            drift[position] = math.log(ratio)
        old, noise = now - drift, 0.02 * randn(n)
        samples.train_log_probs.append(old + noise if shift_in_rollout else old)
        samples.rollout_log_probs.append(old if shift_in_rollout else old + noise)
        samples.ref_log_probs.append(now + 0.1 * randn(n))
    return samples


def reference_log_probs(samples: Samples, logits: Tensor, temperature: float = 1.0) -> list[Tensor]:
    """Log-probs of every response token from the full logits, differentiable."""
    result, start = [], 0
    for i, (tokens, total, n) in enumerate(zip(samples.tokens, samples.totals, samples.responses, strict=True)):
        rows = logits[start + total - n - 1 : start + total - 1] / temperature
        if samples.top_p_ids is not None:
            row = torch.repeat_interleave(torch.arange(n), samples.top_p_offsets[i].diff())
            kept = torch.zeros(n, VOCABULARY, dtype=torch.bool)
            kept[row, samples.top_p_ids[i].long()] = True
            rows = rows.masked_fill(~kept, -math.inf)
        result.append(rows.log_softmax(-1).gather(1, tokens[total - n :, None]).squeeze(1))
        start += total
    return result


def select(samples: Samples, indices: list[int], logits: Tensor) -> tuple[Samples, Tensor]:
    """Some of the samples, and their rows of ``logits`` (a leaf's, so that gradients reach it)."""

    def pick(values):
        return None if values is None else [values[i] for i in indices]

    rows = torch.split(logits, samples.totals)
    part = Samples(
        rows[0][:0],
        **{name: pick(getattr(samples, name)) for name in vars(samples) if name != "logits"},
    )
    return part, torch.cat([rows[i] for i in indices])


def slime_batch(args, samples: Samples, logits: Tensor, denominators: list[Tensor]) -> tuple[dict, Tensor]:
    """The micro-batch dict and the logits [1, T, V / TP] that slime's loss gets on this rank."""
    totals, responses = samples.totals, samples.responses

    def local(values: list[Tensor]) -> list[Tensor]:
        return [cp_utils.slice_log_prob_with_cp(v, t, n) for v, t, n in zip(values, totals, responses, strict=True)]

    starts = torch.tensor([0, *totals]).cumsum(0).tolist()
    cp_size, cp_rank = mpu.get_context_parallel_world_size(), mpu.get_context_parallel_rank()
    rows = [torch.arange(s, s + t) for s, t in zip(starts, totals, strict=False)]
    if not args.allgather_cp:
        rows = [cp_utils.slice_with_cp(r, -1) for r in rows]
    rows = torch.cat(rows)
    multiple = 8 * cp_size if args.allgather_cp else 8
    rows = torch.nn.functional.pad(rows, (0, -rows.numel() % multiple), value=-1)
    if args.allgather_cp:
        rows = rows.chunk(cp_size)[cp_rank]
    columns = logits.chunk(mpu.get_tensor_model_parallel_world_size(), dim=1)[mpu.get_tensor_model_parallel_rank()]
    local_logits = torch.where((rows >= 0)[:, None], columns[rows.clamp(min=0)], 0.0)[None]

    batch = {
        "unconcat_tokens": samples.tokens,
        "total_lengths": totals,
        "response_lengths": responses,
        "loss_masks": samples.loss_masks,
        "advantages": local(samples.advantages),
        "log_probs": local(samples.train_log_probs),
        "rollout_log_probs": local(samples.rollout_log_probs),
        "ref_log_probs": local(samples.ref_log_probs),
        "rollout_mask_sums": denominators,
        "group_mask_sums": denominators,  # v0.3.0's name
        "rollout_top_p_token_ids": samples.top_p_ids,
        "rollout_top_p_token_offsets": samples.top_p_offsets,
    }
    return batch, local_logits
