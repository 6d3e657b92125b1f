"""Save and stop when a job is told to end: what SIGTERM does under the launch scripts.

slime saves at ``--save-interval`` alone, and a terminated driver leaves what came since behind. With
``SLIME_FIPO_SAVE_ON_SIGTERM=1`` in its environment, ``python3 -m slime_fipo`` finishes the rollout that is being
generated or trained on, saves, and exits. Whoever stops the job must leave it that long (``RAY_JOB_STOP_WAIT_TIME_S``).
"""

from __future__ import annotations

import functools
import signal
import sys

EXIT_CODE = 128 + signal.SIGTERM


def save_on_sigterm() -> None:
    """Make slime's train loop ask us whether to save, before its train script imports the function that it asks.

    slime's loops call ``should_run_periodic_action`` twice per rollout, after training: whether to save, the only
    question that comes with the number of rollouts, and whether to evaluate. After SIGTERM the first is answered yes,
    and the second ends the run. Before the first rollout is trained there is nothing to save, and SIGTERM ends the
    driver as ever.
    """
    from slime.utils import misc

    original = misc.should_run_periodic_action
    told = False

    def on_sigterm(*_) -> None:
        nonlocal told
        told = True
        print("SIGTERM: finishing this rollout, saving, and stopping", file=sys.stderr, flush=True)

    @functools.wraps(original)
    def should_run_periodic_action(rollout_id, interval, num_rollout_per_epoch=None, num_rollout=None):
        # Not before: ray.init, which comes first, takes the signal for itself.
        signal.signal(signal.SIGTERM, on_sigterm)
        asks_to_save = num_rollout is not None
        if told and not asks_to_save:
            sys.exit(EXIT_CODE)
        if told and interval is not None:
            return True
        return original(rollout_id, interval, num_rollout_per_epoch, num_rollout)

    misc.should_run_periodic_action = should_run_periodic_action
