"""Runs the plugin's cases through a patched slime's ``loss_function``, as ``fipo_loss`` and through the plugin, and
slime's ``policy_loss`` on any slime: ``python -m tests.patches.rig VERSION OUT CP_SIZE WHAT`` with slime on the path.
"""

import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import mpu

from tests.slime.cases import CASES, Case
from tests.slime.rig import World, samples_of, train_step

BUILTIN = dict(loss_type="fipo_loss", custom_loss_function_path=None)
# Both look at fipo_step_id; the rest of what a rollout's first step reports is in the cases.
FIRST_STEP = {
    "first_step": Case(dict(use_rollout_logprobs=True, fipo_step_id=0)),
    "second_step": Case(dict(use_rollout_logprobs=True, fipo_step_id=1)),
}


def fipo_cases(version: str, world: World) -> dict:
    results = {}
    for name, case in {**CASES, **FIRST_STEP}.items():
        if version in case.versions:
            plain = dict(allgather_cp=False) if case.allgather and world.cp == 1 else {}
            results[name] = {
                "plugin": train_step(case.namespace(**plain), samples_of(case), world),
                "built in": train_step(case.namespace(**plain, **BUILTIN), samples_of(case), world),
            }
    return results


def policy_loss_cases(version: str, world: World) -> dict:
    results = {}
    for name, case in {**CASES, "eps_clip_c": Case(dict(eps_clip_c=3.0))}.items():
        if version in case.versions:
            plain = dict(allgather_cp=False) if case.allgather and world.cp == 1 else {}
            args = case.namespace(**plain, loss_type="policy_loss")
            results[name] = train_step(args, samples_of(case), world)
    return results


def run_rank(version: str, out: Path, world: World, what: str, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}.store", rank=rank, world_size=world.size)
    mpu.initialize_model_parallel(context_parallel_size=world.cp)
    torch.compiler.set_stance("force_eager")
    results = (fipo_cases if what == "fipo" else policy_loss_cases)(version, world)
    dist.barrier()
    if rank == 0:
        torch.save(results, out)


def main() -> None:
    version, out, cp_size, what = sys.argv[1:]
    world = World(cp=int(cp_size))
    children = []
    for rank in range(world.size):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                run_rank(version, Path(out), world, what, rank)
                status = 0
            except BaseException:
                traceback.print_exc()
            sys.stderr.flush()
            os._exit(status)
        children.append(child)
    if any([os.waitpid(child, 0)[1] for child in children]):
        sys.exit("a rank failed")


if __name__ == "__main__":
    main()
