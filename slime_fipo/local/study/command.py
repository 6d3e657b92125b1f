"""``slime-fipo compare``: parse, run what is missing, write and print what was found."""

from __future__ import annotations

import argparse
import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ...errors import OneLineParser, UserError
from ...records.store import is_record_folder
from ...report.command import write_report
from ..arguments import flag_of, given_arguments, number, parse_arguments
from ..task import DATA_DIRECTORY, LONG_SUMS
from .arms import BASE_FOLDER, OBJECTIVE_DESTS, SETS, Arm, check_arms, parse_arm
from .results import Curve, Study, print_results, write_results
from .runner import Job, run_jobs

_TASK = DATA_DIRECTORY / LONG_SUMS.name
_DEFAULTS = (
    *("--prompt-data", str(_TASK / "train.jsonl"), "--eval-prompt-data", "heldout", str(_TASK / "heldout.jsonl")),
    *("--demo-data", str(_TASK / "demonstrations.jsonl"), "--demo-steps", "600"),
    *("--rollout-max-response-len", "50", "--eval-interval", "2", "--num-threads", "1"),
)
_PAIRED_DESTS = frozenset(("seed", "rollout_seed", "rollout_shuffle", "load"))


@dataclass(frozen=True)
class Plan:
    """What the command line asks for. ``flags`` are the user's for every run; ``typed`` is all that was given."""

    save: Path
    results: Path
    seeds: range
    num_rollout: int
    arms: tuple[Arm, ...]
    baseline: str
    workers: int
    flags: tuple[str, ...]
    fipo_record: str | None
    typed: tuple[str, ...]

    @property
    def command(self) -> str:
        return shlex.join(("slime-fipo", "compare", *self.typed))

    def run_directory(self, seed: int, folder: str) -> Path:
        return self.save / f"seed-{seed}" / folder

    def base_argv(self, seed: int) -> tuple[str, ...]:
        """Of the base model of ``seed``; arms have the same flags, and more."""
        paired = ("--seed", str(seed), "--rollout-seed", str(seed), "--rollout-shuffle")
        save = str(self.run_directory(seed, BASE_FOLDER))
        return (*_DEFAULTS, *self.flags, *paired, "--num-rollout", "0", "--save", save)

    def arm_argv(self, seed: int, arm: Arm) -> tuple[str, ...]:
        save, base = self.run_directory(seed, arm.folder), self.run_directory(seed, BASE_FOLDER)
        own = ("--num-rollout", str(self.num_rollout), "--load", str(base), "--save", str(save))
        if self.fipo_record is not None:
            own += ("--fipo-record", str(Path(self.fipo_record, f"seed-{seed}", arm.folder, "records")))
        return (*self.base_argv(seed), *arm.flags, *own)

    def jobs(self) -> list[Job]:
        """Seed after seed, so that an interrupted study has whole seeds."""
        jobs = []
        for seed in self.seeds:
            base = self.run_directory(seed, BASE_FOLDER)
            jobs.append(Job(f"seed {seed}, base model", base, self.base_argv(seed)))
            for arm in self.arms:
                save = self.run_directory(seed, arm.folder)
                jobs.append(Job(f"seed {seed}, {arm.name}", save, self.arm_argv(seed, arm), base))
        return jobs


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="slime-fipo compare",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="A paired study: the same base models, data order, sampling seeds and budget for every arm, and the"
        " differences from one of them, seed by seed. By default DAPO against FIPO and against FIPO's weights on the"
        " wrong tokens. The same command continues a study that was interrupted; with more seeds or arms it adds to it."
        " Other flags of slime-fipo local apply to every run.",
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser.add_argument("--save", default="runs/compare", help="directory of all runs")
    parser.add_argument("--results", help="directory of table, picture and numbers (default: --save)")
    parser.add_argument("--seeds", type=number(int, 1, 1000), default=12, help="number of seeds")
    parser.add_argument("--first-seed", type=number(int, 0, 2**62), default=1, help="the others follow it")
    parser.add_argument("--num-rollout", type=number(int, 1, 10**9), default=24, help="rollouts per run")
    parser.add_argument("--arms", choices=tuple(SETS), default="main", help="the arms, where --arm is not given")
    parser.add_argument(
        "--arm",
        action="append",
        metavar="NAME=FLAGS",
        help="an arm and its flags of slime-fipo local, such as --arm 'half=--fipo-preset 7b --lr 5e-5'; may be"
        " repeated, and replaces --arms",
    )
    parser.add_argument("--baseline", metavar="NAME", help="the arm that others are compared with (default: the first)")
    parser.add_argument(
        "--workers", type=number(int, 1, 1024), default=cores, help="runs at once, of --num-threads (here 1) each"
    )
    return parser


def plan_study(argv: list[str]) -> Plan:
    """Parse and check everything, so that a bad flag is an error now and not after the first run.

    Raises:
        UserError: one line that names the flag and the fix.
    """
    args, flags = _parser().parse_known_args(argv)
    arms = tuple(map(parse_arm, args.arm)) if args.arm else SETS[args.arms]
    baseline = arms[0].name if args.baseline is None else args.baseline
    check_arms(arms, baseline)
    given = given_arguments(flags)
    for dest in given:
        if dest in _PAIRED_DESTS:
            raise UserError(f"{flag_of(dest)} is what pairs the arms; the study sets it, so drop it")
        if dest in OBJECTIVE_DESTS:
            raise UserError(f"{flag_of(dest)} tells one arm from another; give it in --arm NAME='flags'")
    plan = Plan(
        save=Path(args.save),
        results=Path(args.results or args.save),
        seeds=range(args.first_seed, args.first_seed + args.seeds),
        num_rollout=args.num_rollout,
        arms=arms,
        baseline=baseline,
        workers=args.workers,
        flags=tuple(flags),
        fipo_record=given.get("fipo_record"),  # of which each run gets a folder, seed-N/ARM/records
        typed=tuple(argv),
    )
    parse_arguments(list(plan.base_argv(args.first_seed)))
    for arm in arms:
        try:
            parse_arguments(list(plan.arm_argv(args.first_seed, arm)))
        except UserError as error:
            raise UserError(f"arm {arm.name!r}: {error}") from None
    return plan


def main(argv: list[str]) -> None:
    """Run what is missing of the study, then write and print its results."""
    plan, console = plan_study(argv), Console(soft_wrap=True, highlight=False)
    run_jobs(plan.jobs(), plan.workers, console)
    curves = {
        arm.name: {seed: Curve.read(plan.run_directory(seed, arm.folder)) for seed in plan.seeds} for arm in plan.arms
    }
    study = Study(curves, plan.baseline)
    effects = study.effects()
    write_results(plan.results, study, effects, plan.command, {arm.name: shlex.join(arm.flags) for arm in plan.arms})
    print_results(console, study, effects)
    for name, what in (
        ("compare.md", "these tables"),
        ("compare.png", "picture"),
        ("curves.csv", "every evaluation of every run"),
        ("effects.csv", "every number of the differences"),
    ):
        console.print(f"  {what}: {plan.results / name}", markup=False)
    records = []
    if plan.fipo_record is not None:
        records = sorted(filter(is_record_folder, Path(plan.fipo_record).glob("seed-*/*")))
    console.print(f"  page to open in a browser: {write_report([plan.save, *records])[0]}", markup=False)
