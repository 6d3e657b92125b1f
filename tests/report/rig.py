"""Token records as a run would leave them, with everything that can happen to a token; and where a browser is."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from slime_fipo.algorithm import FipoConfig, fipo_weights
from slime_fipo.records import StepHeader, TokenRecord, write_step
from slime_fipo.records.packed import token_fates

ALPHABET = "abcdefghijklmnopqrstuvwxyz ,.;=+0123456789\n"
CONFIG = FipoConfig.preset("7b")


def make_records(
    groups: range,
    *,
    group_size: int = 4,
    lengths: tuple[int, int] = (40, 160),
    drift: float = 0.02,
    noise: float = 0.01,
    config: FipoConfig = CONFIG,
    shift_from: str = "rollout",
    vocabulary: int = len(ALPHABET),
    rare: float = 0.01,
    seed: int = 0,
) -> list[TokenRecord]:
    """Records of one step: whole groups, masks with holes, extreme ratios, non-finite shifts, a dropped response.

    Args:
        groups: numbers of the groups; positions follow from them.
        drift, noise: standard deviations of the policy's drift and of the engines' mismatch, in nats.
        rare: share of tokens with an extreme ratio; a tenth of it is not finite.
    """
    rng = np.random.default_rng((seed, groups.start))
    drafts = []
    for group in groups:
        prompt = rng.integers(1, vocabulary + 1, rng.integers(4, 20))
        rewards = rng.integers(0, 2, group_size).astype(float)
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        for member in range(group_size):
            length = int(rng.integers(lengths[0], lengths[1] + 1))
            tokens = rng.integers(1, vocabulary + 1, length)
            mismatch = rng.normal(0, noise, length)
            # Drift comes in stretches, as a policy that learned something about a passage.
            stretch = np.convolve(rng.normal(0, 1, length + 20), np.ones(20) / np.sqrt(20), "valid")[:length]
            shift = drift * stretch + (mismatch if shift_from == "rollout" else 0)
            extreme = rng.random(length) < rare
            shift[extreme] += rng.choice([1.5, 2.0, 2.8, -2.5], extreme.sum())
            shift[rng.random(length) < rare / 10] = rng.choice([np.nan, np.inf, -np.inf])
            mask = np.ones(length, bool)
            if rng.random() < 0.5 and length > 20:
                start = int(rng.integers(length - 10))
                mask[start : start + int(rng.integers(1, max(2, length // 4)))] = False
            drafts.append(
                TokenRecord(
                    position=group * group_size + member,
                    group=group,
                    reward=float(rewards[member]),
                    prompt=prompt.astype(np.int32),
                    tokens=tokens.astype(np.int32),
                    loss_mask=mask,
                    shift=shift.astype(np.float32),
                    advantages=np.full(length, advantages[member], np.float32),
                    future_kl=None,
                    influence=None,
                    fate=np.zeros(length, np.uint8),
                    mismatch=mismatch.astype(np.float32),
                )
            )
    return weigh(drafts, config)


def weigh(records: list[TokenRecord], config: FipoConfig) -> list[TokenRecord]:
    """The records with F, f and fate as the loss has them."""
    result = python_weights(records, config, torch.float32)
    sizes = np.cumsum([len(record.tokens) for record in records])[:-1]
    fate = recorded_fates(records, result)
    parts = [
        np.split(values, sizes)
        for values in (result.future_kl.numpy(), result.metrics["influence_weight"].numpy(), fate)
    ]
    return [
        replace(record, future_kl=future, influence=influence, fate=fates)
        for record, future, influence, fates in zip(records, *parts, strict=True)
    ]


def recorded_fates(records: list[TokenRecord], result) -> np.ndarray:
    """Packed fates of what :func:`python_weights` returned."""
    metrics = {name: values.numpy() for name, values in result.metrics.items()}
    return token_fates(metrics, np.concatenate([record.loss_mask for record in records]))


def python_weights(records: list[TokenRecord], config: FipoConfig, dtype: torch.dtype):
    """:func:`fipo_weights` of the recorded shifts."""
    shift, advantages, mask = (
        torch.from_numpy(np.concatenate([getattr(record, name) for record in records]))
        for name in ("shift", "advantages", "loss_mask")
    )
    shift = shift.to(dtype)
    return fipo_weights(shift, torch.zeros_like(shift), advantages, mask, [len(r.tokens) for r in records], config)


def write_rollout(folder: Path, rollout: int = 0, *, steps: int = 4, alphabet: str = ALPHABET, **options) -> None:
    """First and last step of a rollout: two groups each, the first step without drift."""
    config = options.get("config", CONFIG)
    for step, drift in ((0, 0.0), (steps - 1, options.pop("drift", 0.02))):
        header = StepHeader(
            rollout,
            step,
            steps,
            config.as_dict(),
            "local",
            shift_from=options.get("shift_from", "rollout"),
            samples_per_rollout=64,
            samples_per_prompt=4,
            alphabet=alphabet,
        )
        groups = range(2 * step, 2 * step + 2)
        write_step(folder, header, make_records(groups, drift=drift, **options))


def chromium() -> str:
    """Path of a Chromium; without one the test is skipped, or fails where SLIME_FIPO_REQUIRE_BROWSER is 1 (CI)."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        missing = pytest.fail if os.environ.get("SLIME_FIPO_REQUIRE_BROWSER") == "1" else pytest.skip
        missing("no Chromium was found; on Debian: apt-get install chromium")
    return path
