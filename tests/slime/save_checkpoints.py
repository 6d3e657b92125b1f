"""Megatron's real ``save_checkpoint`` at the rollouts at which slime's loop saves.

``save_checkpoints.py FOLDER ROLLOUTS INTERVAL RETAIN`` runs it with ``--save-retain-interval RETAIN`` and without, and
prints the checkpoints that are left as JSON.
"""

import json
import sys
import threading
from argparse import Namespace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.training import checkpointing, global_vars
from slime.utils.misc import should_run_periodic_action


class Arguments(Namespace):
    """What is not set is off, as Megatron's parser leaves it."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)


def save(folder: Path, rollouts: int, interval: int, retain: int | None) -> dict:
    """The checkpoints that are left, by number, and how many lay there at most once a save was done."""
    global_vars.unset_global_variables()
    global_vars.set_args(
        Arguments(
            save=str(folder), ckpt_format="torch", optimizer="adam", no_save_optim=True, save_retain_interval=retain
        )
    )
    model = torch.nn.Linear(1, 1)
    model.state_dict_for_save_checkpoint = model.state_dict
    most = 0
    for rollout in range(rollouts):
        if should_run_periodic_action(rollout, interval, None, rollouts):
            checkpointing.save_checkpoint(rollout, [model], None, None, num_floating_point_operations_so_far=0)
            for thread in threading.enumerate():  # Megatron deletes in one
                if thread is not threading.current_thread() and not thread.daemon:
                    thread.join()
            most = max(most, len(list(folder.glob("iter_*"))))
    return {"most": most, "left": sorted(int(path.name[5:]) for path in folder.glob("iter_*"))}


def main():
    folder, (rollouts, interval, retain) = Path(sys.argv[1]), map(int, sys.argv[2:])
    torch.cuda.get_rng_state = torch.get_rng_state
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mpu.initialize_model_parallel()
    cases = {"newest": retain, "all": None}
    print(json.dumps({name: save(folder / name, rollouts, interval, value) for name, value in cases.items()}))


main()
