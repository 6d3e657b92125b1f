"""The schema: one response at one optimizer step, and what is said once for all responses of a step.

Symbols are the paper's (arXiv:2603.19835, Eq. 3-8). Arrays are numpy, one entry per response token unless said
otherwise.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from enum import IntFlag

import numpy as np


class Fate(IntFlag):
    """What happened to a token's influence weight; several may hold at once.

    ``CLIPPED_HIGH``, ``CLIPPED_LOW``: exp(F) was brought to the upper, lower bound (Eq. 7). ``CAPPED``: A < 0 and
    ratio > s, so the weight went through the safety clamp. ``EXCLUDED``: ratio > c, no part in Future-KL (Eq. 5).
    ``DROPPED``: the sequence filter dropped the response, its loss is 0. ``MASKED``: not trained. ``NONFINITE``: Δ is
    NaN or infinite.
    """

    CLIPPED_HIGH = 1
    CLIPPED_LOW = 2
    CAPPED = 4
    EXCLUDED = 8
    DROPPED = 16
    MASKED = 32
    NONFINITE = 64


FATES = {fate.name.lower(): fate.value for fate in Fate}


@dataclass(frozen=True)
class StepHeader:
    """What one rank says of one optimizer step; everything but the rank is the same on all ranks.

    Args:
        rollout_id: the rollout, from 0.
        step_id: the optimizer step within the rollout, from 0; ``steps_per_rollout`` steps in all.
        dp_rank, dp_size, cp_rank, cp_size: who writes; a step is complete with dp_size · cp_size files.
        config: effective settings, ``FipoConfig.as_dict()``.
        source: what wrote it: ``"slime"``, ``"local"``, or ``"slime dump"`` for what was rebuilt.
        shift_from: ``"rollout"`` or ``"train"``: whose log-probs Δ was measured from.
        samples_per_rollout, samples_per_prompt: sizes of the whole rollout, of which records hold a choice.
        tokenizer: folder that decodes the token ids, if known.
        alphabet: characters of token ids 1, 2, … where there is no tokenizer (the embedded engine); id 0 ends a
            response.
    """

    rollout_id: int
    step_id: int
    steps_per_rollout: int
    config: dict
    source: str
    dp_rank: int = 0
    dp_size: int = 1
    cp_rank: int = 0
    cp_size: int = 1
    shift_from: str = "train"
    samples_per_rollout: int | None = None
    samples_per_prompt: int | None = None
    tokenizer: str | None = None
    alphabet: str | None = None

    def as_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> StepHeader:
        """Inverse of :meth:`as_dict`; keys that a later version added are left out."""
        names = {f.name for f in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in names})


@dataclass
class TokenRecord:
    """One response at one optimizer step.

    Args:
        position: place in the rollout, slime's ``rollout_position``: the key that joins records and dumps.
        group: which prompt's group of the rollout; responses of one group share a prompt.
        reward: what the reward function gave (slime's raw reward); NaN if unknown.
        prompt: token ids of the prompt [P], int32.
        tokens: token ids of the response [T], int32.
        loss_mask: [T] bool, True where trained.
        shift: Δ_t [T] float32 as the loss used it, before its clamp to ±20; not finite where it was not.
        advantages: A_t [T] float32.
        future_kl: F_t [T] float32 in nats, or None where nobody can know it.
        influence: f_t [T] float32 (Eq. 7, after the safety cap), or None as above. The loss was multiplied by f_t, or
            by 0 where ``fate`` says ``DROPPED``.
        fate: [T] uint8, :class:`Fate` flags.
        mismatch: trainer's minus rollout engine's log-prob under the same weights [T] float32, or None if either is
            missing.
        present: [T] bool, False where a context-parallel rank's file is missing; the other arrays hold 0 there.
    """

    position: int
    group: int
    reward: float
    prompt: np.ndarray
    tokens: np.ndarray
    loss_mask: np.ndarray
    shift: np.ndarray
    advantages: np.ndarray
    future_kl: np.ndarray | None
    influence: np.ndarray | None
    fate: np.ndarray
    mismatch: np.ndarray | None = None
    present: np.ndarray | None = None
    header: StepHeader | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.present is None:
            self.present = np.ones(len(self.tokens), dtype=bool)
