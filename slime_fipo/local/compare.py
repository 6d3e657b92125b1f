"""``slime-fipo compare``: DAPO against FIPO on a task with headroom, over several seeds, with equal budgets.

Per seed one base model, and from it one run per arm; each is an ordinary run directory and continues if interrupted.
What comes out is reported as it is: a picture, a table, and the numbers behind both.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from rich.table import Table

from slime_fipo.algorithm import fipo_dests

from .. import files
from ..errors import OneLineParser, UserError
from ..records.store import is_record_folder
from ..report.command import write_report
from .arguments import flag_of, given_arguments, number, parse_arguments
from .engine import run
from .progress import Progress
from .run_directory import RunDirectory
from .task import DATA_DIRECTORY, LONG_SUMS

# DAPO has the dual clip of FIPO's authors too, so that the arms differ by the weights alone.
ARMS = {
    "DAPO": ["--loss-type", "policy_loss", "--eps-clip-c", "10"],
    "FIPO 7b": ["--loss-type", "fipo_loss", "--fipo-preset", "7b"],
    "FIPO 32b": ["--loss-type", "fipo_loss", "--fipo-preset", "32b"],
}
_TASK = DATA_DIRECTORY / LONG_SUMS.name
_DEFAULTS = (
    *("--prompt-data", str(_TASK / "train.jsonl"), "--eval-prompt-data", "heldout", str(_TASK / "heldout.jsonl")),
    *("--demo-data", str(_TASK / "demonstrations.jsonl"), "--demo-steps", "600"),
    *("--rollout-max-response-len", "48", "--eval-interval", "2"),
)
_MEASURES = {
    "area": "area under the accuracy curve",
    "final": "final accuracy",
    "dip": "worst dip after the peak",
    "length": "final mean response length",
}


def main(argv: list[str]) -> None:
    """Run what is missing of the comparison, then report."""
    args, flags = _parse(argv)
    root = Path(args.save)
    curves = {arm: [] for arm in ARMS}
    with Progress() as progress:
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            shared = [*_DEFAULTS, *flags, "--seed", str(seed)]
            base = root / f"seed-{seed}" / "base"
            progress.say(f"seed {seed}: base model")
            run(parse_arguments([*shared, "--num-rollout", "0", "--save", str(base)]), progress)
            for arm, arm_flags in ARMS.items():
                progress.say(f"seed {seed}: {arm}")
                save = base.with_name(arm.lower().replace(" ", "-"))
                own = ["--num-rollout", str(args.num_rollout), "--load", str(base), "--save", str(save)]
                if args.fipo_record is not None:
                    own += ["--fipo-record", str(Path(args.fipo_record, base.parent.name, save.name, "records"))]
                run_args = parse_arguments([*shared, *arm_flags, *own])
                curves[arm].append(_curve(run(run_args, progress), run_args.eval_prompt_data[0]))
    results = {arm: [_measure(curve) for curve in per_seed] for arm, per_seed in curves.items()}
    _report(progress, root, args, curves, results)


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = OneLineParser(
        prog="slime-fipo compare",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="DAPO (policy_loss) against FIPO with the paper's 7B and 32B settings, from the same base models "
        "with the same budget. Other flags of slime-fipo local apply to every run.",
    )
    parser.add_argument("--save", default="runs/compare", help="directory of all runs and of the report")
    parser.add_argument("--seeds", type=number(int, 1, 1000), default=3, help="number of seeds")
    parser.add_argument("--first-seed", type=number(int, 0, 2**62), default=1, help="the others follow it")
    parser.add_argument("--num-rollout", type=number(int, 1, 10**9), default=24, help="rollouts per run")
    args, flags = parser.parse_known_args(argv)
    given = given_arguments(flags)
    for name in ("seed", "load", "loss_type", "eps_clip_c", *fipo_dests()):
        if name in given:
            raise UserError(f"{flag_of(name)} is what the comparison sets itself; drop it")
    for arm_flags in ARMS.values():  # a bad flag is an error now, not after the first arm
        parse_arguments([*_DEFAULTS, *flags, *arm_flags])
    args.fipo_record = given.get("fipo_record")  # of which each run gets a folder, seed-N/ARM/records
    return args, flags


def _curve(directory: RunDirectory, eval_name: str) -> dict[str, list[float]]:
    rows = [row for row in directory.metrics() if "eval/step" in row]
    return {
        "rollouts": [row["eval/step"] for row in rows],
        "accuracy": [row[f"eval/{eval_name}"] for row in rows],
        "length": [row[f"eval/{eval_name}/response_len/mean"] for row in rows],
    }


def _measure(curve: dict[str, list[float]]) -> dict[str, float]:
    """The table's numbers of one run; the area is the mean accuracy over the run, between 0 and 1."""
    rollouts, accuracy = np.array(curve["rollouts"]), np.array(curve["accuracy"])
    return {
        "area": float(((accuracy[1:] + accuracy[:-1]) / 2 * np.diff(rollouts)).sum() / (rollouts[-1] - rollouts[0])),
        "final": float(accuracy[-1]),
        "dip": float((np.maximum.accumulate(accuracy) - accuracy).max()),
        "length": curve["length"][-1],
    }


def _report(progress: Progress, root: Path, args: argparse.Namespace, curves: dict, results: dict) -> None:
    columns = ["", *_MEASURES.values()]
    rows = []
    for arm, per_seed in results.items():
        values = np.array([[measured[name] for name in _MEASURES] for measured in per_seed])
        spread = values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(len(_MEASURES))
        digits = [1 if name == "length" else 3 for name in _MEASURES]
        rows.append([arm, *(f"{m:.{d}f} ± {s:.{d}f}" for m, s, d in zip(values.mean(0), spread, digits, strict=True))])
    title = f"mean ± standard deviation over {args.seeds} seeds, {args.num_rollout} rollouts each"

    markdown = ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    markdown += ["| " + " | ".join(row) + " |" for row in rows]
    text = "\n".join(markdown) + f"\n\n{title[0].upper()}{title[1:]}.\n"
    files.replace(root / "compare.md", lambda temporary: temporary.write_text(text, encoding="utf-8"))
    numbers = json.dumps({"measures": results, "curves": curves}, indent=2) + "\n"
    files.replace(root / "compare.json", lambda temporary: temporary.write_text(numbers, encoding="utf-8"))
    _draw(root / "compare.png", curves)

    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="left" if not column else "right")
    for row in rows:
        table.add_row(*row)
    progress.console.print(table)
    for name, what in (("compare.png", "picture"), ("compare.md", "this table"), ("compare.json", "every number")):
        progress.say(f"  {what}: {root / name}")
    records = sorted(filter(is_record_folder, Path(args.fipo_record).glob("seed-*/*"))) if args.fipo_record else []
    progress.say(f"  page to open in a browser: {write_report([root, *records])[0]}")


def _draw(path: Path, curves: dict) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axis, name, title in zip(
        axes, ("accuracy", "length"), ("held-out accuracy", "mean response length"), strict=True
    ):
        for arm, per_seed in curves.items():
            x, values = per_seed[0]["rollouts"], np.array([curve[name] for curve in per_seed])
            [line] = axis.plot(x, values.mean(axis=0), label=arm)
            axis.fill_between(
                x, values.min(axis=0), values.max(axis=0), color=line.get_color(), alpha=0.15, linewidth=0
            )
        axis.set_title(f"{title}: mean and range over {len(per_seed)} seeds", fontsize=10)
        axis.set_xlabel("rollout")
        axis.grid(alpha=0.3)
    axes[0].legend()
    files.replace(path, lambda temporary: figure.savefig(temporary, dpi=110))
    plt.close(figure)
