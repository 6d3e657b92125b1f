"""From a loss's packed per-token arrays to token records, for every host.

Arrays are numpy, so that nothing here knows torch; hosts copy what they need off their device first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .schema import Fate, TokenRecord

# Per-token metric of ``FipoWeights.metrics`` that says each fate; a host that records has these computed.
FATE_METRICS = {
    Fate.CLIPPED_HIGH: "clip_high_frac",
    Fate.CLIPPED_LOW: "clip_low_frac",
    Fate.CAPPED: "safety_capped_frac",
    Fate.EXCLUDED: "excluded_frac",
    Fate.DROPPED: "dropped_frac",
    Fate.NONFINITE: "nonfinite_frac",
}
RECORDED_METRICS = ("future_kl", "influence_weight", *FATE_METRICS.values())


def token_fates(metrics: Mapping[str, np.ndarray], loss_mask: np.ndarray) -> np.ndarray:
    """Each token's :class:`Fate` flags [T], uint8, from its 0-or-1 metrics [T] and the loss mask [T]."""
    fate = np.where(np.asarray(loss_mask) != 0, 0, Fate.MASKED).astype(np.uint8)
    for flag, name in FATE_METRICS.items():
        fate |= np.where(np.asarray(metrics[name]) != 0, flag, 0).astype(np.uint8)
    return fate


def token_records(
    prompts: Sequence[np.ndarray],
    tokens: Sequence[np.ndarray],
    positions: Sequence[int],
    groups: Sequence[int],
    rewards: Sequence[float],
    *,
    loss_mask: np.ndarray,
    shift: np.ndarray,
    advantages: np.ndarray,
    metrics: Mapping[str, np.ndarray],
    mismatch: np.ndarray | None = None,
    spans: Sequence[Sequence[tuple[int, int]]] | None = None,
) -> list[TokenRecord]:
    """One record per response.

    Args:
        prompts, tokens: token ids of each prompt and of each whole response.
        positions, groups, rewards: one per response, as in :class:`TokenRecord`.
        loss_mask, shift, advantages, mismatch: [T], the responses end to end; with ``spans`` the tokens of those alone.
        metrics: at least ``RECORDED_METRICS``, each [T] as above.
        spans: per response the ranges [start, end) of its tokens that this rank holds; None: all of them. Outside of
            them a record holds 0 and is not ``present``. :func:`write_step` takes the same spans.
    """
    packed = {
        "loss_mask": np.asarray(loss_mask) != 0,
        "shift": np.asarray(shift, dtype=np.float32),
        "advantages": np.asarray(advantages, dtype=np.float32),
        "future_kl": np.asarray(metrics["future_kl"], dtype=np.float32),
        "influence": np.asarray(metrics["influence_weight"], dtype=np.float32),
        "fate": token_fates(metrics, loss_mask),
        "mismatch": None if mismatch is None else np.asarray(mismatch, dtype=np.float32),
    }
    if spans is None:
        spans = [[(0, len(response))] for response in tokens]
    records, offset = [], 0
    for i, (response, held) in enumerate(zip(tokens, spans, strict=True)):
        own = np.concatenate([np.arange(*span) for span in held] or [np.arange(0)])
        values = {name: None if v is None else np.zeros(len(response), v.dtype) for name, v in packed.items()}
        for name, whole in values.items():
            if whole is not None:
                whole[own] = packed[name][offset : offset + len(own)]
        present = np.zeros(len(response), dtype=bool)
        present[own] = True
        records.append(
            TokenRecord(
                position=positions[i],
                group=groups[i],
                reward=rewards[i],
                prompt=np.asarray(prompts[i], dtype=np.int32),
                tokens=np.asarray(response, dtype=np.int32),
                present=present,
                **values,
            )
        )
        offset += len(own)
    return records
