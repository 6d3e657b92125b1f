"""Which responses of which optimizer steps are recorded: a function of numbers that every rank knows.

slime trains each response once per rollout, so a rollout's first and last step see different ones; each gets half of
the budget. Whole groups are chosen, so that responses to one prompt can be compared.
"""

from __future__ import annotations

from .arguments import RecordSettings


def chosen_groups(
    settings: RecordSettings,
    *,
    rollout_id: int,
    step_id: int,
    steps_per_rollout: int,
    positions: range,
    samples_per_prompt: int,
) -> list[range]:
    """The groups to record of one optimizer step, the same on every rank without communication.

    Args:
        rollout_id, step_id: from 0; there are ``steps_per_rollout`` steps.
        positions: the step's range of rollout positions. A group is ``samples_per_prompt`` consecutive positions, the
            first one starting at 0; the step need not begin or end with a group.

    Returns:
        Per chosen group its rollout positions, in order; empty where nothing of the step is recorded. Groups are spread
        evenly over the step. Incomplete ones are chosen only where the step holds no whole group, or the budget is
        smaller than a group.
    """
    last = steps_per_rollout - 1
    if rollout_id % settings.interval or step_id not in (0, last) or not positions:
        return []
    budget = settings.samples
    if last > 0:  # the first step gets the odd one
        budget = budget // 2 if step_id == last else (budget + 1) // 2
    first_group, last_group = positions[0] // samples_per_prompt, positions[-1] // samples_per_prompt
    groups = [
        range(max(g * samples_per_prompt, positions.start), min((g + 1) * samples_per_prompt, positions.stop))
        for g in range(first_group, last_group + 1)
    ]
    groups = [group for group in groups if len(group) == samples_per_prompt] or groups
    count = min(len(groups), max(1, budget // max(map(len, groups))))
    return [groups[i * len(groups) // count][:budget] for i in range(count) if budget]
