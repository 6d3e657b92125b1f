"""Runs the plugin's cases through a patched slime's ``loss_function``, as ``fipo_loss`` and through the plugin, and
slime's ``policy_loss`` on any slime: ``python -m tests.patches.rig VERSION OUT CP_SIZE WHAT`` with slime on the path.
"""

import argparse
import os
import sys
import traceback
from argparse import Namespace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import mpu

from tests.slime.cases import CASES, SLIME_DEFAULTS, Case
from tests.slime.rig import World, samples_of, train_step

# Both look at fipo_step_id; the rest of what a rollout's first step reports is in the cases.
FIRST_STEP = {
    "first_step": Case(dict(use_rollout_logprobs=True, fipo_step_id=0)),
    "second_step": Case(dict(use_rollout_logprobs=True, fipo_step_id=1)),
}


def built_in_namespace(args: Namespace) -> Namespace:
    """The namespace as the patched slime's parser and validation leave it."""
    from slime.utils.fipo import add_fipo_arguments, validate_fipo_args

    sizes = dict(rollout_batch_size=8, n_samples_per_prompt=4, global_batch_size=8, keep_old_actor=False)
    unset = vars(add_fipo_arguments(argparse.ArgumentParser()).parse_args([]))
    given = {name: value for name, value in vars(args).items() if name not in ("fipo_impl", "fipo_chunk_size")}
    built_in = Namespace(**{**unset, **sizes, "fipo_step_id": 1, **given})
    built_in.loss_type, built_in.custom_loss_function_path = "fipo_loss", None
    validate_fipo_args(built_in)
    return built_in


def fipo_cases(version: str, world: World) -> dict:
    results = {}
    for name, case in {**CASES, **FIRST_STEP}.items():
        if version in case.versions:
            plain = dict(allgather_cp=False) if case.allgather and world.cp == 1 else {}
            results[name] = {
                "plugin": train_step(case.namespace(**plain), samples_of(case), world),
                "built in": train_step(built_in_namespace(case.namespace(**plain)), samples_of(case), world),
            }
    return results


def policy_loss_cases(version: str, world: World) -> dict:
    """One run for all cases that differ in FIPO's settings alone, which ``policy_loss`` does not look at."""
    results, seen = {}, set()
    for name, case in {**CASES, "eps_clip_c": Case(dict(eps_clip_c=3.0))}.items():
        plain = dict(allgather_cp=False) if case.allgather and world.cp == 1 else {}
        flags = {**case.args, **plain, "loss_type": "policy_loss"}
        flags = {flag: value for flag, value in flags.items() if not flag.startswith("fipo_")}
        # An option that is spelt out at its default is no combination of its own either.
        key = (case.data, *sorted((f, v) for f, v in flags.items() if v != SLIME_DEFAULTS[f]))
        if version in case.versions and key not in seen:
            seen.add(key)
            results[name] = train_step(Case(flags).namespace(), samples_of(case), world)
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
