"""What a person sees of a run: progress while it lasts, then one picture and a short table.

Every number comes from ``metrics.jsonl``, so the report is true of what was left behind.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import rich.progress
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .. import files
from .run_directory import RunDirectory

matplotlib.use("Agg")
from matplotlib import pyplot as plt


class Progress:
    """A progress bar on a terminal; plain lines where the output is a file or a pipe."""

    def __init__(self):
        self.console = Console(soft_wrap=True, highlight=False)
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeRemainingColumn(),
            rich.progress.TextColumn("{task.fields[state]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def track(self, description: str, start: int, stop: int) -> Iterator[int]:
        self._description, self._number, self._stop = description, start, stop
        self._task = self._bar.add_task(description, completed=start, total=max(start, stop), state="")
        for number in range(start, stop):
            self._number = number
            yield number
            self._bar.advance(self._task)

    def show(self, state: str) -> None:
        """Where the tracked loop stands."""
        self._bar.update(self._task, state=state)
        if self._bar.disable:
            self.say(f"{self._description} {self._number + 1}/{self._stop}: {state}")

    def say(self, message: str) -> None:
        self.console.print(message, markup=False)


def _series(rows: list[dict], axis: str, name: str) -> tuple[list, list]:
    points = [(row[axis], row[name]) for row in rows if axis in row and name in row]
    return [x for x, _ in points], [y for _, y in points]


def _eval_name(rows: list[dict]) -> str:
    """The held-out set's metric, such as ``eval/heldout``."""
    row = next(row for row in rows if "eval/step" in row)
    return next(name for name in row if name.startswith("eval/") and name != "eval/step")


def write_picture(directory: RunDirectory) -> None:
    """``training.png``: accuracy, response length, influence weight, entropy and clip fraction over rollouts."""
    rows = directory.metrics()
    heldout = _eval_name(rows)
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5), layout="constrained")
    panels = [
        ("accuracy", [("rollout/raw_reward", "rollouts (all sampled)"), (heldout, "held-out")]),
        (
            "response length (tokens)",
            [("rollout/response_len/mean", "rollouts"), (f"{heldout}/response_len/mean", "held-out")],
        ),
        ("mean influence weight f", [("fipo/influence_weight", "f")]),
        ("mean |f − 1|", [("fipo/influence_deviation", "|f − 1|")]),
        ("entropy (nats)", [("train/entropy_loss", "entropy")]),
        (
            "clipped share of tokens",
            [
                ("train/pg_clipfrac", "PPO clip"),
                ("fipo/clip_high_frac", "f at its upper bound"),
                ("fipo/clip_low_frac", "f at its lower bound"),
            ],
        ),
    ]
    for axis, (title, lines) in zip(axes.flat, panels, strict=True):
        for name, label in lines:
            is_eval = name.startswith("eval/")
            x, y = _series(rows, "eval/step" if is_eval else "rollout/step", name)
            axis.plot(x, y, label=label, marker="o" if is_eval else None, markersize=4)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("rollout")
        axis.grid(alpha=0.3)
        if len(lines) > 1:
            axis.legend(fontsize=8)
    axes.flat[0].set_ylim(0, 1.02)
    axes.flat[2].axhline(1.0, color="gray", linewidth=0.8, linestyle="--")
    files.replace(directory.path / "training.png", lambda temporary: figure.savefig(temporary, dpi=110))
    plt.close(figure)


def summarize(args: argparse.Namespace, directory: RunDirectory) -> dict:
    """Before and after, from the first and last evaluation; FIPO's weights over all rollouts."""
    rows = directory.metrics()
    heldout = _eval_name(rows)
    evaluations = [row for row in rows if "eval/step" in row]

    def at(row: dict) -> dict:
        return {
            "rollouts": row["eval/step"],
            "accuracy": row[heldout],
            "response_length": row[f"{heldout}/response_len/mean"],
        }

    _, deviations = _series(rows, "rollout/step", "fipo/influence_deviation")
    return {
        "loss_type": args.loss_type,
        "evaluated_on": heldout.removeprefix("eval/"),
        "before": at(evaluations[0]),
        "after": at(evaluations[-1]),
        "example": _example(directory.path / "transcripts"),
        "influence_deviation": sum(deviations) / len(deviations) if deviations else None,
    }


def _example(transcripts: Path) -> dict | None:
    """The first held-out prompt that was answered wrong before and right after."""
    if not (transcripts / "after.jsonl").exists():
        return None
    before, after = (
        [json.loads(line) for line in (transcripts / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in ("before", "after")
    )
    for a, b in zip(before, after, strict=True):
        if a["reward"] < b["reward"]:
            return {"prompt": a["prompt"], "responses": [a["response"], b["response"]]}
    return None


def print_summary(console: Console, path: Path, summary: dict) -> None:
    before, after = summary["before"], summary["after"]
    table = Table(title=f"{summary['loss_type']}, {summary['evaluated_on']} prompts")
    for column in ("", "before", f"after {after['rollouts']} rollouts"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("accuracy", f"{before['accuracy']:.3f}", f"{after['accuracy']:.3f}")
    table.add_row("mean response length", f"{before['response_length']:.1f}", f"{after['response_length']:.1f}")
    if summary["example"]:
        texts = (f"a response to {summary['example']['prompt']}", *summary["example"]["responses"])
        table.add_row(*map(escape, texts))
    if summary["influence_deviation"] is not None:
        table.add_row("mean |f - 1| of the influence weights", "", f"{summary['influence_deviation']:.4f}")
    console.print(table)
    for name, what in (
        ("training.png", "picture"),
        ("metrics.jsonl", "every number"),
        ("transcripts", "responses before and after"),
        ("tensorboard", "events, for tensorboard --logdir"),
        ("checkpoints", "newest weights"),
    ):
        console.print(f"  {what}: {path / name}", markup=False)
