"""Rollout metrics that slime lacks, for its ``--custom-rollout-log-function-path``.

The response-length-weighted mean advantage (paper, Fig. 4c), and what the reward's verifier did. slime's own follow.
"""

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


def verdict_shares(samples: Sequence) -> dict[str, float]:
    """Means of what the reward says beside the accuracy: ``second_look_frac`` and ``unread_frac``.

    Args:
        samples: slime's ``Sample`` objects; those without a reward dictionary that has the key do not count, and where
            none has it the metric is left out (a reward of another source).
    """
    shares = {}
    for key in ("second_look", "unread"):
        values = [sample.reward[key] for sample in samples if isinstance(sample.reward, dict) and key in sample.reward]
        if values:
            shares[f"{key}_frac"] = float(np.mean(values))
    return shares


def log_rollout_data(
    rollout_id: int, args: Namespace, samples: list, rollout_extra_metrics: dict | None, rollout_time: float
) -> bool:
    """Log to slime's trackers; slime's own rollout metrics follow.

    ``rollout/second_look_frac`` and ``rollout/unread_frac`` (:func:`verdict_shares`); ``rollout/removed_frac``, the
    share of responses that were kept without advantage and are not trained on (``filters.accuracy_varies``), where
    there are any; ``rollout/length_weighted_mean_advantage`` only where the advantage is the group-normalised reward
    (``GRPO_LIKE`` estimators without a custom reward post-processing), rather than a number about other advantages
    than the trained ones.

    Returns:
        False, which tells slime to go on with its own logging.
    """
    metrics = {f"rollout/{name}": value for name, value in verdict_shares(samples).items()}
    removed = float(np.mean([sample.remove_sample for sample in samples]))
    if removed:
        metrics["rollout/removed_frac"] = removed
    if (
        args.advantage_estimator in GRPO_LIKE
        and args.rewards_normalization
        and args.custom_reward_post_process_path is None
    ):
        advantages = group_advantages(
            [sample.get_reward_value(args) for sample in samples],
            [sample.group_index for sample in samples],
            normalise_std=args.grpo_std_normalization and args.advantage_estimator != "reinforce_plus_plus_baseline",
        )
        lengths = [0 if sample.remove_sample else sample.effective_response_length for sample in samples]
        metrics["rollout/length_weighted_mean_advantage"] = length_weighted_mean_advantage(advantages, lengths)
    if metrics:
        tracking.log(args, rollout_id, metrics, step_key="rollout/step")
    return False
