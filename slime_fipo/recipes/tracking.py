"""Hands a hook's metrics to slime's own trackers (wandb, TensorBoard)."""

from __future__ import annotations

from argparse import Namespace


def log(args: Namespace, rollout_id: int, metrics: dict[str, float], step_key: str) -> None:
    """Log ``metrics`` at slime's step for ``rollout_id``, under the step axis ``step_key`` that slime defines."""
    try:
        from slime.observability import logging_utils
        from slime.observability.metric_utils import compute_rollout_step
    except ModuleNotFoundError:  # slime v0.3.x
        from slime.utils import logging_utils
        from slime.utils.metric_utils import compute_rollout_step

    logging_utils.log(args, {**metrics, step_key: compute_rollout_step(args, rollout_id)}, step_key=step_key)
