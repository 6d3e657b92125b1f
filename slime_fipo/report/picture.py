"""``training.png``: a run of the embedded engine in one picture, from its ``metrics.jsonl``. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path

import matplotlib

from .. import files
from .metrics import METRICS_FILE, eval_name, read_metrics, series

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def write_picture(run_directory: Path) -> None:
    """``training.png``: accuracy, response length, influence weight, entropy and clip fraction over rollouts."""
    rows = read_metrics(run_directory / METRICS_FILE)
    heldout = eval_name(rows)
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
            x, y = series(rows, "eval/step" if is_eval else "rollout/step", name)
            axis.plot(x, y, label=label, marker="o" if is_eval else None, markersize=4)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("rollout")
        axis.grid(alpha=0.3)
        if len(lines) > 1:
            axis.legend(fontsize=8)
    axes.flat[0].set_ylim(0, 1.02)
    axes.flat[2].axhline(1.0, color="gray", linewidth=0.8, linestyle="--")
    files.replace(run_directory / "training.png", lambda temporary: figure.savefig(temporary, dpi=110))
    plt.close(figure)
