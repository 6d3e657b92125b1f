"""Settings of the FIPO objective.

One frozen, validated dataclass that every implementation and every host reads. Command-line flags live in
``arguments.py``; nothing here knows about a host.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

DECAY_OVER = ("positions", "trained_tokens")
IMPLEMENTATIONS = ("auto", "chunked", "scan", "triton")

# Bounds of the authors' unclipped mode, and of the safety cap on negative samples (their released loss function).
UNCLIPPED_BOUNDS = (0.0, 10.0)
SAFETY_BOUNDS = (0.8, 1.0)

LARGEST = 1e38  # numbers that meet tensors stay finite in float32, also with 1 added
LARGEST_INTEGER = 2**31 - 1


def refuse(name: str, value, wanted: str) -> None:
    """Raise a ValueError of one line: what ``name`` is, and what it must be."""
    try:
        shown = repr(value)
    except ValueError:  # Python prints no integer of more than 4,300 digits
        shown = f"an integer of {value.bit_length()} bits"
    shown = shown if len(shown) <= 80 else f"{shown[:40]}…"
    raise ValueError(f"{name} is {shown}; it must be {wanted}")


def check_number(name: str, value, in_range: Callable[[float], bool], wanted: str) -> None:
    """Require a real number, finite as a float, in a range; bool and text are none.

    Raises:
        ValueError: as :func:`refuse` words it.
    """
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    try:
        good = is_number and math.isfinite(value) and in_range(value)
    except OverflowError:  # an integer beyond float
        good = False
    if not good:
        refuse(name, value, wanted)


def check_integer(name: str, value, minimum: int, also: str = "") -> None:
    """Require an integer of at least ``minimum`` that int32 holds; bool is none. ``also``: what else the field takes.

    Raises:
        ValueError: as :func:`refuse` words it.
    """
    is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_integer or value < minimum:
        refuse(name, value, f"an integer of at least {minimum}{also}")
    if value > LARGEST_INTEGER:
        refuse(name, value, f"an integer of at most {LARGEST_INTEGER}{also}")


@dataclass(frozen=True)
class FipoConfig:
    """Settings of FIPO (arXiv:2603.19835, Eq. 3-8 and Sec. 3.2). All fields are validated on construction.

    Args:
        decay_rate: τ, the half-life of Future-KL in tokens; γ = 2^(−1/τ). Any finite number above 0.
        clip_ratio_low: ε_low in [0, 1); the influence weight's lower bound is 1 − ε_low.
        clip_ratio_high: ε_high ≥ 0; the influence weight's upper bound is 1 + ε_high.
        clip_high_only: lower bound 1.0 instead of 1 − ε_low.
        clip_influence: False is the authors' unclipped mode: weights bounded to [0, 10] only.
        safety_thresh: s; where A < 0 and ratio > s the weight is clamped to [0.8, 1.0]. None: no cap.
        dual_clip_c: c > 1, the dual-clip constant. Tokens with a ratio above c do not take part in Future-KL.
            None turns participation filter, dual clip and sequence filter off.
        max_dual_clipped_tokens: a response with more unmasked tokens than this that have A < 0 and ratio > c
            is dropped. None turns this sequence filter off alone.
        decay_over: what counts as distance: ``positions`` (the paper: masked tool tokens included) or
            ``trained_tokens`` (unmasked tokens only, so a long tool result does not erase influence across it).
        impl: how Future-KL is computed: ``chunked`` (the paper's matrix form), ``scan`` (linear time), ``triton`` (a
            fused GPU kernel, in float32, checked against ``scan`` before its first use: ``kernel_check.py``), or
            ``auto``, which is ``scan``.
        chunk_size: columns per matrix product of ``chunked``; the result does not depend on it.

    Raises:
        ValueError: a value is out of range; the message names the field, the value and the range.
    """

    decay_rate: float = 32.0
    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.2
    clip_high_only: bool = False
    clip_influence: bool = True
    safety_thresh: float | None = 10.0
    dual_clip_c: float | None = 10.0
    max_dual_clipped_tokens: int | None = 1
    decay_over: str = "positions"
    impl: str = "auto"
    chunk_size: int = 128

    def __post_init__(self) -> None:
        check_number("decay_rate", self.decay_rate, lambda x: x > 0, "a finite number above 0 (half-life in tokens)")
        check_number("clip_ratio_low", self.clip_ratio_low, lambda x: 0 <= x < 1, "a number in [0, 1)")
        check_number(
            "clip_ratio_high", self.clip_ratio_high, lambda x: 0 <= x <= LARGEST, f"a finite number in [0, {LARGEST:g}]"
        )
        if self.safety_thresh is not None:
            check_number("safety_thresh", self.safety_thresh, lambda x: x > 0, "a finite number above 0, or None")
        if self.dual_clip_c is not None:
            wanted = f"a finite number above 1 and at most {LARGEST:g}, or None"
            check_number("dual_clip_c", self.dual_clip_c, lambda x: 1 < x <= LARGEST, wanted)
        if self.max_dual_clipped_tokens is not None:
            check_integer("max_dual_clipped_tokens", self.max_dual_clipped_tokens, 0, ", or None")
        check_integer("chunk_size", self.chunk_size, 1)
        for name in ("clip_high_only", "clip_influence"):
            if not isinstance(getattr(self, name), bool):
                refuse(name, getattr(self, name), "True or False")
        for name, choices in (("decay_over", DECAY_OVER), ("impl", IMPLEMENTATIONS)):
            if getattr(self, name) not in choices:
                refuse(name, getattr(self, name), "one of " + ", ".join(map(repr, choices)))

    @property
    def influence_bounds(self) -> tuple[float, float]:
        """Lower and upper bound of the influence weight (Eq. 7)."""
        if not self.clip_influence:
            return UNCLIPPED_BOUNDS
        return (1.0 if self.clip_high_only else 1.0 - self.clip_ratio_low), 1.0 + self.clip_ratio_high

    @classmethod
    def preset(cls, name: str, **overrides) -> FipoConfig:
        """The paper's settings for one of its runs, ``"7b"`` (App. B.2) or ``"32b"`` (the authors' script).

        Args:
            name: key of ``PRESETS``.
            overrides: fields that win over the preset.
        """
        if name not in PRESETS:
            raise ValueError(f"preset {name!r} is unknown; it must be one of {', '.join(map(repr, PRESETS))}")
        return replace(cls(**PRESETS[name]), **overrides)

    def as_dict(self) -> dict:
        """Field names and values, in order of declaration."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


# Both: τ 32, dual clip 10, chunk 128, as in the defaults above. What differs is said in full.
PRESETS: dict[str, dict] = {
    "7b": {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2, "clip_high_only": False, "safety_thresh": 3.0},
    "32b": {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2, "clip_high_only": True, "safety_thresh": 10.0},
}
