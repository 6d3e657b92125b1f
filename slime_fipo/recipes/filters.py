"""DAPO's dynamic sampling on accuracy, for slime's ``--dynamic-sampling-filter-path``.

slime's own filter looks at the reward's spread. With a shaped score that keeps groups in which every answer is right
and only lengths differ, whose advantages would then reward brevity alone; so this one looks at ``acc``.
"""

from __future__ import annotations

from argparse import Namespace
from itertools import chain


def accuracy_varies(args: Namespace, samples: list, **kwargs):
    """Keep a group only if it holds both right and wrong answers (DAPO, arXiv:2503.14476, Eq. 11).

    Args:
        args: slime's namespace; unused.
        samples: the group's ``Sample`` objects (lists of them from fan-out rollouts), each with a reward dictionary
            that has ``acc``, as :func:`slime_fipo.recipes.reward.dapo_math_reward` returns.

    Returns:
        slime's ``DynamicFilterOutput``; a dropped group's reason is ``all_right`` or ``all_wrong``.

    Raises:
        ValueError: a reward without ``acc``.
    """
    from slime.rollout.filter_hub.base_types import DynamicFilterOutput

    right = {bool(accuracy_of(sample)) for sample in _flat(samples)}
    if len(right) > 1:
        return DynamicFilterOutput(keep=True)
    return DynamicFilterOutput(keep=False, reason="all_right" if right == {True} else "all_wrong")


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


def _flat(samples: list):
    return chain.from_iterable(one if isinstance(one, list) else [one] for one in samples)
