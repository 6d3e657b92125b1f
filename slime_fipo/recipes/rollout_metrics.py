"""Response-length-weighted mean advantage (paper, Fig. 4c), for slime's ``--custom-rollout-log-function-path``."""

from __future__ import annotations

from argparse import Namespace
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from . import tracking

GRPO_LIKE = ("grpo", "gspo", "cispo", "reinforce_plus_plus_baseline")


def length_weighted_mean_advantage(advantages: Sequence[float], lengths: Sequence[int]) -> float:
    """Σ_t A_t / Σ_i L_i over all tokens, for advantages that are constant along a response: Σ A_i L_i / Σ L_i.

    Its plain mean over a group is 0; this is above 0 where the longer responses are the better ones.
    NaN without tokens.
    """
    advantages, lengths = np.asarray(advantages, dtype=np.float64), np.asarray(lengths, dtype=np.float64)
    return float((advantages * lengths).sum() / lengths.sum()) if lengths.sum() else float("nan")


def group_advantages(rewards: Sequence[float], groups: Sequence[int], normalise_std: bool = True) -> np.ndarray:
    """GRPO's advantage per response: reward minus the group's mean, over its standard deviation (as slime: n − 1)."""
    rewards, groups = np.asarray(rewards, dtype=np.float64), np.asarray(groups)
    members = defaultdict(list)
    for i, group in enumerate(groups.tolist()):
        members[group].append(i)
    advantages = np.zeros_like(rewards)
    for indices in members.values():
        centred = rewards[indices] - rewards[indices].mean()
        if normalise_std and len(indices) > 1:
            centred /= centred.std(ddof=1) + 1e-6
        advantages[indices] = centred
    return advantages


def log_rollout_data(
    rollout_id: int, args: Namespace, samples: list, rollout_extra_metrics: dict | None, rollout_time: float
) -> bool:
    """Log ``rollout/length_weighted_mean_advantage`` to slime's trackers; slime's own rollout metrics follow.

    Only where the advantage is the group-normalised reward (``GRPO_LIKE`` estimators without a custom reward
    post-processing); elsewhere nothing is logged, rather than a number about other advantages than the trained ones.

    Returns:
        False, which tells slime to go on with its own logging.
    """
    if (
        args.advantage_estimator not in GRPO_LIKE
        or not args.rewards_normalization
        or args.custom_reward_post_process_path is not None
    ):
        return False
    advantages = group_advantages(
        [sample.get_reward_value(args) for sample in samples],
        [sample.group_index for sample in samples],
        normalise_std=args.grpo_std_normalization and args.advantage_estimator != "reinforce_plus_plus_baseline",
    )
    lengths = [0 if sample.remove_sample else sample.effective_response_length for sample in samples]
    mean_advantage = length_weighted_mean_advantage(advantages, lengths)
    tracking.log(args, rollout_id, {"rollout/length_weighted_mean_advantage": mean_advantage}, step_key="rollout/step")
    return False
