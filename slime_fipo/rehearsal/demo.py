"""``make demo-slime``: the embedded demo's task, trained by slime's own ``train.py``, beside the embedded engine.

The same base model, prompts, reward, group filter, batch sizes and optimizer settings; SGLang samples, Megatron-LM
trains, Ray connects them, and the plugin's loss is what a user's job runs. What starts and ends the processes is in
``cluster.py``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.table import Table

from .. import files
from ..errors import OneLineParser, UserError
from ..local import engine
from ..local.arguments import parse_arguments
from ..local.checkpoint import checkpoint_files
from ..local.progress import Progress
from .cluster import Rehearsal
from .flags import MEGATRON_FLAGS, SGLANG_FLAGS
from .metrics import read_scalars
from .qwen3 import export, model_flags

SLIME_FILTERS = "slime.rollout.filter_hub.dynamic_sampling_filters"
# Flags that slime and the embedded engine share, names and meanings alike; slime gets the embedded run's values.
_SHARED = (
    *("num_rollout", "rollout_batch_size", "n_samples_per_prompt", "rollout_max_response_len", "rollout_temperature"),
    *("eval_interval", "n_samples_per_eval_prompt", "global_batch_size", "eps_clip", "eps_clip_high", "lr"),
    *("weight_decay", "adam_beta1", "adam_beta2", "clip_grad", "input_key", "label_key", "seed", "loss_type"),
    "advantage_estimator",
)


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="make demo-slime", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--slime-root", type=Path, required=True, help="checkout of slime")
    parser.add_argument("--megatron-root", type=Path, required=True, help="checkout of Megatron-LM 1dcf0daf")
    parser.add_argument("--save", type=Path, default=Path("runs/demo-slime"), help="everything the demo leaves behind")
    parser.add_argument("--loss-type", choices=("fipo_loss", "policy_loss"), default="fipo_loss", help="the objective")
    parser.add_argument("--train-script", choices=("train.py", "train_async.py"), default="train.py", help="slime's")
    parser.add_argument("--context-parallel-size", type=int, choices=(1, 2), default=1, help="ranks per sequence")
    parser.add_argument("--num-rollout", type=int, default=16, help="rollouts of both engines")
    parser.add_argument("--num-threads", type=int, default=2, help="CPU threads of the embedded engine")
    return parser


def slime_flags(args: argparse.Namespace, demo: argparse.Namespace, checkpoint: Path, folder: Path) -> list[str]:
    """slime's command line for the embedded run's settings.

    Args:
        args: the embedded engine's namespace.
        demo: the demo's own.
        checkpoint: the base model, exported.
        folder: where the weights pass from Megatron to SGLang, and FIPO's token records are written.
    """
    ranks = demo.context_parallel_size
    flags = {f"--{name.replace('_', '-')}": getattr(args, name) for name in _SHARED}
    flags |= {
        "--hf-checkpoint": checkpoint,
        "--load": checkpoint,
        "--prompt-data": args.prompt_data,
        "--custom-rm-path": f"{__package__}.demo_reward.sums_reward",
        # Like the embedded engine's, it fills a rollout up with groups of equal reward rather than sample on and on.
        "--dynamic-sampling-filter-path": f"{SLIME_FILTERS}.check_reward_nonzero_std_with_fallback",
        "--over-sampling-batch-size": 2 * args.rollout_batch_size,
        "--eval-max-response-len": args.rollout_max_response_len,
        "--eval-temperature": args.rollout_temperature,
        "--eval-top-p": 1,
        "--update-weight-transport": "disk",
        "--update-weight-disk-dir": folder / "weights",
        "--actor-num-nodes": 1,
        "--actor-num-gpus-per-node": ranks,
        "--num-gpus-per-node": ranks + 1,
        "--rollout-num-gpus": 1,
        "--context-parallel-size": ranks,
        "--micro-batch-size": 1,
        "--max-tokens-per-gpu": 4096,
        "--optimizer": "adam",
        "--lr-decay-style": "constant",
        "--attention-dropout": 0,
        "--hidden-dropout": 0,
        "--tb-project-name": "demo-slime",
        "--tb-experiment-name": args.loss_type,
    }
    switches = ["--use-rollout-logprobs", "--use-dynamic-batch-size", "--use-tensorboard"]
    switches += ["--accumulate-allreduce-grads-in-fp32", "--attention-softmax-in-fp32"]
    if args.loss_type == "fipo_loss":
        switches += ["--fipo-record", str(folder / "records"), "--fipo-record-interval", "5"]
    if args.rollout_shuffle:
        switches += ["--rollout-shuffle"]
    evaluation = ["--eval-prompt-data", *args.eval_prompt_data]
    pairs = [str(part) for pair in flags.items() for part in pair]
    return [*pairs, *evaluation, *switches, *model_flags(args), *MEGATRON_FLAGS, *SGLANG_FLAGS]


def train_in_slime(args: argparse.Namespace, demo: argparse.Namespace, checkpoint: Path, folder: Path) -> None:
    """One training by slime's script; its TensorBoard events are in ``folder`` afterwards.

    Raises:
        UserError: slime stopped with an error; names the log.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    script = demo.slime_root.resolve() / demo.train_script
    environment = {"TENSORBOARD_DIR": str(folder / "tensorboard"), "HF_HUB_OFFLINE": "1"}
    with Rehearsal(
        demo.slime_root,
        demo.megatron_root,
        gpus=demo.context_parallel_size + 1,
        log=folder / "ray.log",
        environment=environment,
    ) as rehearsal:
        command = [sys.executable, "-m", "slime_fipo", script, *slime_flags(args, demo, checkpoint, folder)]
        status = rehearsal.run(command, folder / "train.log")
    if status:
        raise UserError(f"slime's {demo.train_script} ended with status {status}; its output is in {folder}/train.log")


def slime_curves(folder: Path, steps_per_rollout: int) -> dict[str, list[tuple[float, float]]]:
    """Curves over rollouts of a slime run, by what they show; held-out points count the rollouts trained on."""
    scalars = read_scalars(folder)

    def of(name: str) -> list[tuple[int, float]]:
        return scalars.get(name, [])

    def per_rollout(name: str) -> list[tuple[float, float]]:
        """Means over each rollout's optimizer steps."""
        steps: dict[int, list[float]] = {}
        for step, value in of(name):
            steps.setdefault(step // steps_per_rollout, []).append(value)
        return [(rollout, fmean(values)) for rollout, values in sorted(steps.items())]

    def heldout(name: str) -> list[tuple[float, float]]:
        # slime evaluates before training, and after the rollout that an evaluation is numbered by.
        return [(0 if index == 0 else step + 1, value) for index, (step, value) in enumerate(of(name))]

    def first_steps(name: str) -> list[tuple[float, float]]:
        return [(step // steps_per_rollout, value) for step, value in of(name) if step % steps_per_rollout == 0]

    return {
        "accuracy": [(float(step), value) for step, value in of("rollout/raw_reward")],
        "heldout": heldout("eval/heldout"),
        "length": [(float(step), value) for step, value in of("rollout/response_len/mean")],
        "heldout_length": heldout("eval/heldout/response_len/mean"),
        "deviation": per_rollout("train/fipo/influence_deviation"),
        "engine_difference": first_steps("train/train_rollout_logprob_abs_diff"),
        "mismatch_future_kl": first_steps("train/fipo/mismatch_future_kl_abs"),
        "mismatch_clip": first_steps("train/fipo/mismatch_clip_frac"),
    }


def embedded_curves(metrics: Path) -> dict[str, list[tuple[float, float]]]:
    """The same of an embedded run's ``metrics.jsonl``."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]

    def of(axis: str, name: str) -> list[tuple[float, float]]:
        return [(row[axis], row[name]) for row in rows if axis in row and name in row]

    return {
        "accuracy": of("rollout/step", "rollout/raw_reward"),
        "heldout": of("eval/step", "eval/heldout"),
        "length": of("rollout/step", "rollout/response_len/mean"),
        "heldout_length": of("eval/step", "eval/heldout/response_len/mean"),
        "deviation": of("rollout/step", "fipo/influence_deviation"),
    }


def write_picture(path: Path, slime: dict, embedded: dict, title: str) -> None:
    """Accuracy, length and |f − 1| of both engines, and how far SGLang and Megatron differ in slime."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    figure.suptitle(title)
    # slime averages over the groups that its filter kept, the embedded engine over all that it sampled.
    runs = (("slime", "groups kept", slime, "C0"), ("embedded", "all sampled", embedded, "C1"))
    both = (
        (axes[0, 0], "accuracy", "accuracy", "heldout"),
        (axes[0, 1], "mean response length (tokens)", "length", "heldout_length"),
        (axes[1, 0], "mean |f − 1|", "deviation", None),
    )
    for axis, label, rollouts, heldout in both:
        for name, over, curves, color in runs:
            drawn = f"{name}, rollouts ({over})" if heldout else name
            axis.plot(*_xy(curves[rollouts]), color=color, alpha=0.5 if heldout else 1, label=drawn)
            if heldout:
                axis.plot(*_xy(curves[heldout]), "o-", color=color, label=f"{name}, held-out")
        axis.set_title(label, fontsize=10)
    axes[0, 0].set_ylim(0, 1.02)
    mismatch = axes[1, 1]
    mismatch.plot(*_xy(slime["engine_difference"]), label="mean |Δ log-prob|, SGLang against Megatron")
    mismatch.plot(*_xy(slime["mismatch_future_kl"]), label="mean |Future-KL|")
    mismatch.plot(*_xy(slime["mismatch_clip"]), label="clipped share of weights")
    mismatch.set_title("mismatch of the engines, first step of each rollout", fontsize=10)
    for axis in axes.flat:
        axis.set_xlabel("rollout")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    files.replace(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))
    plt.close(figure)


def _xy(curve: list[tuple[float, float]]) -> tuple[list, list]:
    return [x for x, _ in curve], [y for _, y in curve]


def summarize(slime: dict, embedded: dict) -> dict:
    """Before and after of both engines, and slime's mismatch."""

    def ends(curve: list[tuple[float, float]]) -> list[float]:
        return [curve[0][1], curve[-1][1]]

    def mean(curve: list[tuple[float, float]]) -> float | None:
        return fmean(value for _, value in curve) if curve else None

    return {
        **{
            name: {
                "rollouts": curves["heldout"][-1][0],
                "heldout_accuracy": ends(curves["heldout"]),
                "heldout_length": ends(curves["heldout_length"]),
                "influence_deviation": mean(curves["deviation"]),
            }
            for name, curves in (("slime", slime), ("embedded", embedded))
        },
        "engine_difference": mean(slime["engine_difference"]),
        "mismatch_future_kl": mean(slime["mismatch_future_kl"]),
        "mismatch_clip": mean(slime["mismatch_clip"]),
    }


def print_summary(console: Console, summary: dict, title: str) -> None:
    table = Table(title=title)
    for column in ("", "slime", "embedded"):
        table.add_column(column, justify="left" if not column else "right")
    for label, name in (("held-out accuracy", "heldout_accuracy"), ("held-out length", "heldout_length")):
        table.add_row(label, *("{:.3f} → {:.3f}".format(*summary[run][name]) for run in ("slime", "embedded")))
    deviations = (summary[run]["influence_deviation"] for run in ("slime", "embedded"))
    table.add_row("mean |f − 1|", *("" if value is None else f"{value:.4f}" for value in deviations))
    if summary["engine_difference"] is not None:
        table.add_row("mean |Δ log-prob| of the engines", f"{summary['engine_difference']:.4f}", "")
    console.print(table)


def main(argv: list[str]) -> None:
    """Base model, embedded run, export, slime's run, picture; a finished embedded run is not repeated."""
    demo = build_parser().parse_args(argv)
    shared = ["--num-threads", str(demo.num_threads)]
    base = ["--save", str(demo.save / "base"), "--num-rollout", "0", *shared]
    embedded = [*("--save", str(demo.save / f"embedded-{demo.loss_type}-{demo.num_rollout}")), *shared]
    embedded += ["--load", str(demo.save / "base"), "--num-rollout", str(demo.num_rollout)]
    embedded += ["--use-rollout-logprobs", "--loss-type", demo.loss_type]
    with Progress() as progress:
        base_args, args = parse_arguments(base), parse_arguments(embedded)
        base_run = engine.run(base_args, progress)
        embedded_run = engine.run(args, progress)
        export(checkpoint_files(base_run.checkpoints)[0], demo.save / "hf", base_args, torch.bfloat16)
        name = f"slime-{demo.loss_type}-{demo.train_script.removesuffix('.py')}-cp{demo.context_parallel_size}"
        folder = demo.save.resolve() / name
        progress.say(f"slime's {demo.train_script}: {demo.num_rollout} rollouts; its output goes to {folder}/train.log")
        train_in_slime(args, demo, demo.save.resolve() / "hf", folder)
    steps = args.rollout_batch_size * args.n_samples_per_prompt // args.global_batch_size
    curves = slime_curves(folder / "tensorboard", steps), embedded_curves(embedded_run.metrics_file)
    title = f"{demo.loss_type}, {demo.train_script}, CP {demo.context_parallel_size}"
    write_picture(folder / "training.png", *curves, title)
    summary = summarize(*curves)
    files.replace(folder / "summary.json", lambda temporary: temporary.write_text(json.dumps(summary, indent=2) + "\n"))
    console = Console(soft_wrap=True, highlight=False)
    print_summary(console, summary, title)
    console.print(f"  picture: {folder / 'training.png'}", markup=False)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (UserError, OSError, subprocess.SubprocessError) as error:
        sys.exit(f"demo-slime: {error}")
