"""Sampling responses with Megatron-Core's KV cache, rewarding them, and DAPO's dynamic sampling.

What a rollout becomes for the trainer is in ``train_data.py``.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt import GPTModel

from .data import END, Alphabet, PromptSource, Record
from .model import diverged

SAMPLING_BATCH = 256  # sequences decoded at once; bounds the KV cache


@dataclass
class Sample:
    """One response, under slime's names."""

    prompt: str
    label: str
    tokens: list[int]  # prompt and response
    response_length: int  # with END, where the response ended by itself
    rollout_log_probs: list[float]  # one per response token, recorded while sampling
    truncated: bool
    response: str
    reward: float


@torch.no_grad()
def generate(
    model: GPTModel, prompts: list[list[int]], max_response_len: int, temperature: float, generator: torch.Generator
) -> list[tuple[list[int], list[float]]]:
    """Sample one response per prompt.

    The sequences share one position per decoding step, counted from their first token: a longer prompt's own tokens
    are fed where a shorter one already samples. So nothing is padded, and no attention mask is needed.

    Args:
        prompts: token ids; lengths may differ.
        max_response_len: a response that has not ended after this many tokens is cut there.
        temperature: the distribution sampled from is softmax(logits / temperature).

    Returns:
        Per prompt the response tokens (``END`` included if it came) and the log-prob of each at sampling time.

    Raises:
        UserError: the logits are not finite.
    """
    device = generator.device
    prompt_lengths = torch.tensor([len(p) for p in prompts], device=device)
    start, stop = min(map(len, prompts)), max(map(len, prompts)) + max_response_len
    tokens = torch.full((len(prompts), stop), END, device=device)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt, device=device)
    log_probs = torch.zeros(tokens.shape, device=device)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    context = StaticInferenceContext(len(prompts), stop)
    positions = torch.arange(stop, device=device).expand_as(tokens)

    model.eval()
    fed = 0
    for position in range(start, stop):
        logits = model(
            tokens[:, fed:position],
            positions[:, fed:position],
            None,
            inference_context=context,
            runtime_gather_output=True,
        )[:, -1]
        context.increment_sequence_len_offset(position - fed)
        context.enable_decode_mode()
        fed = position
        log_probs_now = (logits.float() / temperature).log_softmax(-1)
        if not log_probs_now.isfinite().all():
            raise diverged("logits that are not finite")
        drawn = torch.multinomial(log_probs_now.exp(), 1, generator=generator)
        samples = (prompt_lengths <= position) & ~done
        tokens[:, position] = torch.where(samples, drawn.squeeze(1), tokens[:, position])
        log_probs[:, position] = log_probs_now.gather(1, drawn).squeeze(1)
        done |= samples & ((drawn.squeeze(1) == END) | (position + 1 == prompt_lengths + max_response_len))
        if done.all():
            break

    results = []
    for prompt, row, row_log_probs in zip(prompts, tokens.tolist(), log_probs.tolist(), strict=True):
        response = row[len(prompt) : len(prompt) + max_response_len]
        length = response.index(END) + 1 if END in response else len(response)
        results.append((response[:length], row_log_probs[len(prompt) : len(prompt) + length]))
    return results


def reward(response: str, label: str, truncated: bool, answer_separator: str) -> float:
    """1 if the answer (what follows the last separator) is the label and the response ended by itself, else 0."""
    answer = response.rsplit(answer_separator, 1)[-1] if answer_separator else response
    return float(answer == label and not truncated)


def sample_responses(
    args: argparse.Namespace,
    model: GPTModel,
    alphabet: Alphabet,
    records: list[Record],
    n_samples: int,
    generator: torch.Generator,
) -> list[list[Sample]]:
    """``n_samples`` rewarded responses for each record, as one group per record."""
    repeated = [record for record in records for _ in range(n_samples)]
    samples = []
    for i in range(0, len(repeated), SAMPLING_BATCH):
        batch = repeated[i : i + SAMPLING_BATCH]
        prompts = [alphabet.encode(record.prompt) for record in batch]
        outputs = generate(model, prompts, args.rollout_max_response_len, args.rollout_temperature, generator)
        for record, prompt, (response_tokens, log_probs) in zip(batch, prompts, outputs, strict=True):
            truncated = response_tokens[-1] != END
            response = alphabet.decode(response_tokens)
            samples.append(
                Sample(
                    prompt=record.prompt,
                    label=record.target,
                    tokens=prompt + response_tokens,
                    response_length=len(response_tokens),
                    rollout_log_probs=log_probs,
                    truncated=truncated,
                    response=response,
                    reward=reward(response, record.target, truncated, args.answer_separator),
                )
            )
    return [samples[i : i + n_samples] for i in range(0, len(samples), n_samples)]


def collect_rollout(
    args: argparse.Namespace,
    model: GPTModel,
    alphabet: Alphabet,
    source: PromptSource,
    generator: torch.Generator,
) -> tuple[list[list[Sample]], dict[str, float]]:
    """``args.rollout_batch_size`` groups to train on, and how they came about.

    With dynamic sampling, groups whose rewards are all equal are set aside and other prompts sampled, for at most
    ``args.max_sampling_rounds`` rounds; if groups are missing then, those set aside first fill up.

    Returns:
        The groups, and metrics over everything sampled (before any group was dropped).
    """
    kept, equal, rounds = [], [], 0
    while len(kept) < args.rollout_batch_size and rounds < args.max_sampling_rounds:
        rounds += 1
        records = source.take(args.rollout_batch_size)
        for group in sample_responses(args, model, alphabet, records, args.n_samples_per_prompt, generator):
            all_equal = len({sample.reward for sample in group}) == 1
            (equal if all_equal and args.dynamic_sampling else kept).append(group)
    sampled = [sample for group in kept + equal for sample in group]
    lengths = [sample.response_length for sample in sampled]
    groups = kept[: args.rollout_batch_size]
    filled_up = args.rollout_batch_size - len(groups)
    metrics = {
        "rollout/raw_reward": float(np.mean([sample.reward for sample in sampled])),
        "rollout/response_len/mean": float(np.mean(lengths)),
        "rollout/response_len/max": max(lengths),
        "rollout/truncated_ratio": float(np.mean([sample.truncated for sample in sampled])),
        "rollout/groups_sampled": len(kept) + len(equal),
        "rollout/groups_of_equal_reward": len(equal),
        "rollout/groups_filled_up": filled_up,
    }
    return groups + equal[:filled_up], metrics
