"""Runs the plugin's cases through a patched slime's ``loss_function``, as ``fipo_loss`` and through the plugin's route
without launcher; and slime's ``policy_loss`` on any slime.

``python -m tests.patches.rig VERSION OUT CP_SIZE WHAT`` with slime on the path.
"""

import os
import sys
import traceback
from argparse import Namespace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import mpu

from slime_fipo.algorithm import fipo_config_from_args
from tests.slime.cases import CASES, SLIME_DEFAULTS, Case
from tests.slime.rig import World, samples_of, train_step

# What the patches leave to the plugin.
NOT_BUILT_IN = ("fipo_decay_over", "fipo_unclipped", "fipo_max_dual_clipped_tokens", "fipo_shift_from")


def is_built_in(case: Case) -> bool:
    return case.args.get("fipo_dual_clip_c") != "none" and not any(name in case.args for name in NOT_BUILT_IN)


def built_in_namespace(args: Namespace) -> Namespace:
    """The plugin's namespace with a patched slime's settings in it."""
    config = fipo_config_from_args(args)
    names = ("decay_rate", "clip_ratio_low", "clip_ratio_high", "clip_high_only", "safety_thresh", "dual_clip_c")
    settings = {f"fipo_{name}": getattr(config, name) for name in names}
    return Namespace(**{**vars(args), **settings, "loss_type": "fipo_loss", "custom_loss_function_path": None})


def fipo_cases(version: str, world: World) -> dict:
    results = {}
    for name, case in CASES.items():
        if version in case.versions and is_built_in(case):
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
