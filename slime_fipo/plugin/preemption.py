"""Save and stop when a job is told to end: what SIGTERM does under the launch scripts.

slime saves at ``--save-interval`` alone, and a terminated driver leaves what came since behind. With
``SLIME_FIPO_SAVE_ON_SIGTERM=1`` in its environment, ``python3 -m slime_fipo`` finishes the rollout that is being
generated or trained on, saves, and exits. Whoever stops the job must leave it that long (``RAY_JOB_STOP_WAIT_TIME_S``).
"""

from __future__ import annotations

import functools
import signal
import sys
from types import ModuleType

EXIT_CODE = 128 + signal.SIGTERM


def save_on_sigterm() -> None:
    """Make slime's train loop ask us whether to save, before its train script imports the function that it asks.

    slime's loops call ``should_run_periodic_action`` twice per rollout, after training: whether to save, the only
    question that comes with the number of rollouts, and whether to evaluate. After SIGTERM the first is answered yes,
    and the second ends the run once a checkpoint is complete. Before the first rollout is trained there is nothing to
    save, and SIGTERM ends the driver as ever.
    """
    from slime.utils import misc

    _Stop(misc).install()


class _Stop:
    """What a driver knows of the signal and of its checkpoints.

    Attributes:
        told: SIGTERM came.
        saves: the run has ``--save-interval``; without it slime saves nothing at all.
        saved: a checkpoint since the last rollout was trained is complete.
        may_still_save: the loop has not yet asked whether to save what it trained last.
    """

    def __init__(self, misc: ModuleType) -> None:
        self.misc, self.original = misc, misc.should_run_periodic_action
        self.told = self.saves = self.saved = self.may_still_save = self.installed = False

    def install(self) -> None:
        @functools.wraps(self.original)
        def should_run_periodic_action(
            rollout_id, interval, num_rollout_per_epoch=None, num_rollout=None, *rest, **more
        ):
            if not self.installed:
                # Not before: ray.init, which comes first, takes the signal for itself.
                signal.signal(signal.SIGTERM, self.on_sigterm)
                self.finalize_saves()
                self.installed = True
            asks_to_save = num_rollout is not None
            if asks_to_save:
                self.saves, self.saved, self.may_still_save = interval is not None, False, False
                if self.told and self.saves:
                    return True
            else:
                self.may_still_save = True
            if self.told and (self.saved or not self.saves):
                sys.exit(EXIT_CODE)
            if self.told and not asks_to_save:
                return False  # an evaluation would take the time that the next save needs
            return self.original(rollout_id, interval, num_rollout_per_epoch, num_rollout, *rest, **more)

        self.misc.should_run_periodic_action = should_run_periodic_action

    def on_sigterm(self, *_) -> None:
        self.told = True
        if not self.saves:
            what = "stopping after this rollout. This run has no --save-interval: what it trained is not saved"
        elif self.may_still_save:
            what = "finishing this rollout, saving, and stopping"
        else:
            what = "stopping at the next complete checkpoint, this rollout's or the next one's"
        print(f"SIGTERM: {what}", file=sys.stderr, flush=True)

    def finalize_saves(self) -> None:
        """After the signal, slime is to wait for Megatron's asynchronous checkpoint, as it does for a run's last one.

        Otherwise the driver's end would take the actors down before ``latest_checkpointed_iteration.txt`` names it.
        """
        from slime.ray.actor_group import RayTrainGroup

        original = RayTrainGroup.save_model

        @functools.wraps(original)
        def save_model(group, rollout_id, force_sync=False, *rest, **more):
            force_sync = force_sync or self.told
            result = original(group, rollout_id, force_sync, *rest, **more)
            self.saves = True  # with --release-train the loop saves without asking
            self.saved = bool(force_sync or not getattr(group.args, "async_save", False))
            return result

        RayTrainGroup.save_model = save_model
