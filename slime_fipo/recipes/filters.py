"""DAPO's dynamic sampling on accuracy, for slime's ``--dynamic-sampling-filter-path``.

slime's own filter looks at the reward's spread. With a shaped score that keeps groups in which every answer is right
and only lengths differ, whose advantages would then reward brevity alone; so this one looks at ``acc``. It gives up
after a bounded number of groups, where slime would sample for ever.
"""

from __future__ import annotations

import logging
from argparse import Namespace
from collections import Counter
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

ROLLOUTS_IN_A_ROW = 8
GROUPS_IN_A_ROW = 256
RESPONSE_END = 200  # characters shown

logger = logging.getLogger(__name__)


def most_drops_in_a_row(rollout_batch_size: int) -> int:
    """Groups dropped one after another at which :func:`accuracy_varies` gives up.

    Eight rollouts' worth, and at least 256: with one usable group in 20 a run meets 256 others in a row twice in a
    million times, and a rollout that needs more than eight times its size for one group would need that for each.
    """
    return max(GROUPS_IN_A_ROW, ROLLOUTS_IN_A_ROW * rollout_batch_size)


@dataclass
class _Dropped:
    """What was dropped since a group was last kept for its accuracy."""

    groups: Counter = field(default_factory=Counter)  # by reason
    responses: int = 0
    judged: int = 0  # responses whose reward says whether an answer was read
    unread: int = 0
    example: Any = None  # a sample, one without an answer if there was one
    example_unread: bool = False

    def add(self, reason: str, samples: list) -> None:
        self.groups[reason] += 1
        for sample in samples:
            unread = sample.reward.get("unread") if isinstance(sample.reward, dict) else None
            self.responses += 1
            self.judged += unread is not None
            self.unread += bool(unread)
            if self.example is None or (unread and not self.example_unread):
                self.example, self.example_unread = sample, bool(unread)

    def warn(self) -> None:
        share = self.unread / self.judged if self.judged else 0.0
        logger.warning(
            "accuracy_varies dropped %d groups in a row (%s) and kept none. In %s of their %d responses no integer was"
            " read. %s. One, with label %r, ends: %r. Until a group varies, groups are kept so that the rollout ends"
            " and its metrics are logged, with remove_sample set, so that nothing is trained on them",
            self.groups.total(),
            ", ".join(f"{count} {reason}" for reason, count in self.groups.most_common()),
            f"{share:.0%}" if self.judged else "an unknown share",
            self.responses,
            "The prompts may ask for another form of answer than the reward reads (docs/runs), or responses be cut off"
            if share > 0.1
            else "The prompts may be too hard or too easy for the model",
            str(self.example.label)[:80],
            self.example.response[-RESPONSE_END:],
        )


_dropped = _Dropped()  # slime calls the filter in one process, group after group, and tells it of no rollout


def accuracy_varies(args: Namespace, samples: list, **kwargs):
    """Keep a group only if it holds both right and wrong answers (DAPO, arXiv:2503.14476, Eq. 11).

    After :func:`most_drops_in_a_row` others one warning says what was dropped, and further groups are kept although
    they do not vary, until one does. They have no advantage, so each sample gets ``remove_sample`` and with it an empty
    loss mask: neither the loss nor the overlong penalty gives them a gradient.

    Args:
        args: slime's namespace; reads ``rollout_batch_size``.
        samples: the group's ``Sample`` objects (lists of them from fan-out rollouts), each with a reward dictionary
            that has ``acc``, as :func:`slime_fipo.recipes.reward.dapo_math_reward` returns.

    Returns:
        slime's ``DynamicFilterOutput``; a dropped group's reason is ``all_right``, ``all_wrong`` or ``aborted`` (one of
        its responses was aborted, so that slime has no reward to train on; such a group is never kept).

    Raises:
        ValueError: a reward without ``acc``.
        RuntimeError: the group that would be kept was aborted.
    """
    global _dropped
    from slime.rollout.filter_hub.base_types import DynamicFilterOutput

    samples = list(chain.from_iterable(one if isinstance(one, list) else [one] for one in samples))
    if any(is_aborted(sample) for sample in samples):
        reason = "aborted"
    else:
        right = {bool(accuracy_of(sample)) for sample in samples}
        if len(right) > 1:
            _dropped = _Dropped()
            return DynamicFilterOutput(keep=True)
        reason = "all_right" if right == {True} else "all_wrong"

    most = most_drops_in_a_row(args.rollout_batch_size)
    if _dropped.groups.total() < most:
        _dropped.add(reason, samples)
        if _dropped.groups.total() == most:
            _dropped.warn()
        return DynamicFilterOutput(keep=False, reason=reason)
    if reason == "aborted":
        raise RuntimeError(f"{most} groups in a row could not be used, and this one was aborted; see the engines' logs")
    for sample in samples:
        sample.remove_sample = True
    if "keep_when_insufficient" in DynamicFilterOutput.__dataclass_fields__:  # slime v0.3.1 and later
        return DynamicFilterOutput(keep=False, reason=reason, keep_when_insufficient=True)
    return DynamicFilterOutput(keep=True)


def is_aborted(sample) -> bool:
    """Whether the engine aborted the response, which slime then gives no reward."""
    return sample.reward is None and getattr(sample.status, "value", None) == "aborted"


def accuracy_of(sample) -> float:
    """``acc`` of a sample's reward.

    Raises:
        ValueError: the reward is no dictionary with ``acc``.
    """
    if not isinstance(sample.reward, dict) or "acc" not in sample.reward:
        raise ValueError(
            f"the reward of sample {sample.index} has no 'acc': use"
            " --custom-rm-path slime_fipo.recipes.reward.dapo_math_reward, or a reward that returns it"
        )
    return float(sample.reward["acc"])
