"""A run of the embedded engine in a few lines on the terminal, before against after, from what it left behind."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .metrics import METRICS_FILE, eval_name, read_metrics, series


def summarize(loss_type: str, run_directory: Path) -> dict:
    """Before and after, from the first and last evaluation; FIPO's weights over all rollouts."""
    rows = read_metrics(run_directory / METRICS_FILE)
    heldout = eval_name(rows)
    evaluations = [row for row in rows if "eval/step" in row]

    def at(row: dict) -> dict:
        return {
            "rollouts": row["eval/step"],
            "accuracy": row[heldout],
            "response_length": row[f"{heldout}/response_len/mean"],
        }

    _, deviations = series(rows, "rollout/step", "fipo/influence_deviation")
    return {
        "loss_type": loss_type,
        "evaluated_on": heldout.removeprefix("eval/"),
        "before": at(evaluations[0]),
        "after": at(evaluations[-1]),
        "example": _example(run_directory / "transcripts"),
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
        ("report.html", "page to open in a browser"),
        ("training.png", "picture"),
        ("metrics.jsonl", "every number"),
        ("transcripts", "responses before and after"),
        ("tensorboard", "events, for tensorboard --logdir"),
        ("checkpoints", "newest weights"),
    ):
        console.print(f"  {what}: {path / name}", markup=False)
