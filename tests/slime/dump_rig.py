"""Makes dumps with slime's own saving functions, in several parallel layouts: ``python -m tests.slime.dump_rig OUT``.

A program of its own, with one slime version on the path. Ranks are gloo processes that slice a rollout as slime's
actors do; ``OUT/LAYOUT`` is then a folder of ``--dump-details``, ``OUT/expected.pt`` what it was made from.
"""

from __future__ import annotations

import os
import sys
import traceback
from argparse import Namespace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import mpu
from slime.backends.megatron_utils.cp_utils import slice_log_prob_with_cp
from slime.utils.types import Sample

from . import micro_batch
from .rig import World

try:
    from slime.observability.rollout_data_utils import save_debug_rollout_data
    from slime.observability.train_data_utils import save_debug_train_data

    TRAIN_FILE = "{rollout_id}.pt"
except ModuleNotFoundError:  # v0.3.x: a file per rank, and the rollout's file is written by a method
    from slime.ray.rollout import RolloutManager
    from slime.utils.train_dump_utils import save_debug_train_data

    TRAIN_FILE = "{rollout_id}_{rank}.pt"

    def save_debug_rollout_data(template, data, *, rollout_id, evaluation):
        manager = Namespace(args=Namespace(save_debug_rollout_data=template))
        method = RolloutManager.__ray_actor_class__._save_debug_rollout_data
        method(manager, data, rollout_id=rollout_id, evaluation=evaluation)


WORLDS = {"cp1": World(), "cp2_dp2": World(cp=2, dp=2), "tp2_cp2": World(tp=2, cp=2)}
SAMPLES_PER_PROMPT = 5
STEPS = 2


def rollout_data(samples: micro_batch.Samples, world: World) -> dict:
    """This rank's part of the rollout, as slime's actor holds it when it saves."""
    dp = mpu.get_data_parallel_rank()
    count = len(samples.tokens)
    partition = [p for p in range(count) if p % world.dp == dp]
    steps = [[i for i, p in enumerate(partition) if p * STEPS // count == step] for step in range(STEPS)]

    def slices(values):
        if world.cp == 1:
            return [values[p] for p in partition]
        return [slice_log_prob_with_cp(values[p], samples.totals[p], samples.responses[p]) for p in partition]

    return {
        "partition": partition,
        "sample_indices": [100 + p for p in partition],  # dynamic sampling leaves gaps
        "tokens": [samples.tokens[p] for p in partition],
        "loss_masks": [samples.loss_masks[p] for p in partition],
        "total_lengths": [samples.totals[p] for p in partition],
        "response_lengths": [samples.responses[p] for p in partition],
        "rewards": [float(p) for p in partition],
        "raw_reward": [float(p % 2) for p in range(count)],
        "rollout_log_probs": slices(samples.rollout_log_probs),
        "log_probs": slices(samples.log_probs),
        "advantages": slices(samples.advantages),
        "micro_batch_indices": [[i] for step in steps for i in step],
        "num_microbatches": [len(step) for step in steps],
        "global_batch_sizes": [count // STEPS] * STEPS,
    }


def run_rank(rank: int, world: World, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}.store", rank=rank, world_size=world.size)
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=world.tp, context_parallel_size=world.cp, create_gloo_process_groups=True
    )
    samples = micro_batch.make_samples(shift_in_rollout=True)
    data = rollout_data(samples, world)
    if "rank" in TRAIN_FILE:
        del data["partition"]  # v0.3.x takes it out before training
    args = Namespace(save_debug_train_data=f"{folder}/train_data/{TRAIN_FILE}")
    save_debug_train_data(args, rollout_id=7, rollout_data=data)
    if rank == 0:
        rollout = [
            Sample(
                group_index=3 + p // SAMPLES_PER_PROMPT,
                index=100 + p,
                prompt="prompt",
                tokens=samples.tokens[p].tolist(),
                response="response",
                response_length=samples.responses[p],
                label="1",
                reward={"score": 0.5, "acc": float(p % 2)},
                status=Sample.Status.COMPLETED,
            )
            for p in range(len(samples.tokens))
        ]
        template = f"{folder}/rollout_data/{{rollout_id}}.pt"
        save_debug_rollout_data(template, rollout, rollout_id=7, evaluation=False)
        evaluation = {"heldout": {"samples": rollout, "rewards": [], "truncated": []}}
        save_debug_rollout_data(template, evaluation, rollout_id=7, evaluation=True)
        names = ("tokens", "responses", "advantages", "loss_masks", "log_probs", "rollout_log_probs")
        torch.save({name: getattr(samples, name) for name in names}, folder.parent / "expected.pt")
    dist.barrier()


def main() -> None:
    out = Path(sys.argv[1])
    for name, world in WORLDS.items():
        children = []
        for rank in range(world.size):
            if (pid := os.fork()) == 0:
                status = 1
                try:
                    run_rank(rank, world, out / name)
                    status = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stderr.flush()
                    os._exit(status)
            children.append(pid)
        if any(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children):
            sys.exit(f"a rank of {name} failed")


if __name__ == "__main__":
    main()
