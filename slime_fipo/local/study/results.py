"""What a study found: curves and paired effects, as CSV, Markdown, one picture and one sentence.

All of it is a function of the runs' evaluations, so it can be made again, with another baseline too, without a run.
"""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from scipy.integrate import trapezoid

from ... import files
from ...report.metrics import METRICS_FILE, eval_name, read_metrics
from .statistics import CONFIDENCE, Effect, paired_effect

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PERCENT = f"{CONFIDENCE:.0%}"


@dataclass(frozen=True)
class Measure:
    """One number per run. ``digits`` after the point: of its mean and spread, of differences."""

    key: str
    title: str
    digits: tuple[int, int]


MEASURES = (
    Measure("area", "area under the accuracy curve", (3, 4)),
    Measure("final", "final accuracy", (3, 4)),
    Measure("length", "final mean response length", (1, 2)),
)


@dataclass(frozen=True)
class Curve:
    """A run's evaluations: rollouts trained on so far, held-out accuracy, mean response length in tokens."""

    rollouts: list[int]
    accuracy: list[float]
    length: list[float]

    @classmethod
    def read(cls, run_directory: Path) -> Curve:
        rows = read_metrics(run_directory / METRICS_FILE)
        name = eval_name(rows)
        rows = [row for row in rows if "eval/step" in row]
        columns = ("eval/step", name, f"{name}/response_len/mean")
        return cls(*([row[column] for row in rows] for column in columns))

    def measures(self) -> dict[str, float]:
        """By key of ``MEASURES``; the area is the mean accuracy over the run, between 0 and 1."""
        area = trapezoid(self.accuracy, self.rollouts) / (self.rollouts[-1] - self.rollouts[0])
        return {"area": float(area), "final": self.accuracy[-1], "length": self.length[-1]}


@dataclass(frozen=True)
class Study:
    """Curves of every arm [arm][seed], and the arm that the others are compared with."""

    curves: dict[str, dict[int, Curve]]
    baseline: str

    @property
    def seeds(self) -> list[int]:
        return list(self.curves[self.baseline])

    @property
    def others(self) -> list[str]:
        return [arm for arm in self.curves if arm != self.baseline]

    def values(self, arm: str, measure: Measure) -> np.ndarray:
        """[seeds]"""
        return np.array([self.curves[arm][seed].measures()[measure.key] for seed in self.seeds])

    def differences(self, arm: str, measure: Measure) -> np.ndarray:
        """``arm`` minus the baseline, seed by seed [seeds]."""
        return self.values(arm, measure) - self.values(self.baseline, measure)

    def effects(self) -> dict[tuple[str, str], Effect]:
        """By (arm, measure's key), of every arm but the baseline."""
        return {(a, m.key): paired_effect(self.differences(a, m)) for a in self.others for m in MEASURES}


def conclusion(study: Study, effects: dict[tuple[str, str], Effect]) -> str:
    """What the study can and cannot tell, in one sentence, by its first measure."""
    measure, seeds = MEASURES[0], len(study.seeds)
    if seeds == 1:
        return f"One seed gives no interval, so this study cannot tell whether any arm differs from {study.baseline}."
    found = {arm: effects[arm, measure.key] for arm in study.others}
    widest = max(effect.half_width for effect in found.values())
    differ = [f"{arm} ({effect.mean:+.4f})" for arm, effect in found.items() if effect.excludes_zero]
    rest = [arm for arm, effect in found.items() if not effect.excludes_zero]
    told = f"can tell from {study.baseline} {_listing(differ)}" if differ else f"can tell no arm from {study.baseline}"
    untold = f" and cannot tell {_listing(rest)}" if rest and differ else ""
    return (
        f"By the {measure.title}, over {seeds} seeds, this study {told}{untold}; it resolves differences of"
        f" {widest:.4f} (the widest half of a {PERCENT} interval), and says nothing of smaller ones, of other tasks or"
        " of larger models."
    )


def _listing(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


# -- tables --


def _number(value: float, digits: int, sign: str = "") -> str:
    return "–" if np.isnan(value) else f"{value:{sign}.{digits}f}"


def mean_rows(study: Study) -> list[list[str]]:
    """Header and one row per arm: mean ± standard deviation over seeds."""
    rows = [["", *(m.title for m in MEASURES)]]
    for arm in study.curves:
        cells = []
        for m in MEASURES:
            values = study.values(arm, m)
            spread = f" ± {values.std(ddof=1):.{m.digits[0]}f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.{m.digits[0]}f}{spread}")
        rows.append([arm, *cells])
    return rows


def effect_rows(study: Study, effects: dict[tuple[str, str], Effect]) -> list[list[str]]:
    """Header and one row per arm but the baseline: mean difference, interval, p."""
    rows = [[f"minus {study.baseline}", *(m.title for m in MEASURES)]]
    for arm in study.others:
        cells = []
        for m in MEASURES:
            e, digits = effects[arm, m.key], m.digits[1]
            mean, low, high = (_number(value, digits, "+") for value in (e.mean, e.low, e.high))
            cells.append(f"{mean} [{low}, {high}], p = {_number(e.p_value, 4)}")
        rows.append([arm, *cells])
    return rows


def _markdown(rows: list[list[str]]) -> str:
    header, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([header, "| --- " * len(rows[0]) + "|", *body])


def markdown(study: Study, effects: dict[tuple[str, str], Effect], command: str) -> str:
    """The page ``compare.md``."""
    seeds, rollouts = len(study.seeds), study.curves[study.baseline][study.seeds[0]].rollouts[-1]
    comparisons = len(study.others)
    return "\n\n".join(
        (
            f"`{command}`",
            conclusion(study, effects),
            f"Mean ± standard deviation over {seeds} seeds, {rollouts} rollouts each:",
            _markdown(mean_rows(study)),
            f"Paired differences: the mean over seeds, its {PERCENT} interval (Student's), and p of the sign-flip test"
            f" (two-sided; at best {2 ** (1 - seeds):.2g} with {seeds} seeds). Of {comparisons} intervals in a column,"
            f" {(1 - CONFIDENCE) * comparisons:.1f} miss 0 by chance if no arm differs.",
            _markdown(effect_rows(study, effects)),
            "![curves and paired differences](compare.png)",
            "Every number: [curves.csv](curves.csv), [effects.csv](effects.csv). The arms:"
            " [compare.json](compare.json).",
        )
    )


# -- files --


def write_results(
    folder: Path, study: Study, effects: dict[tuple[str, str], Effect], command: str, arms: dict[str, str]
) -> None:
    """``compare.json``, ``compare.md``, ``compare.png``, ``curves.csv`` and ``effects.csv`` in ``folder``.

    Args:
        command: that makes them again.
        arms: name -> flags.
    """
    curves = (
        (arm, seed, *row)
        for arm, per_seed in study.curves.items()
        for seed, c in per_seed.items()
        for row in zip(c.rollouts, c.accuracy, c.length, strict=True)
    )
    _write_csv(folder / "curves.csv", ("arm", "seed", "rollouts", "accuracy", "response_length"), curves)
    names = [field.name for field in dataclasses.fields(Effect)]
    rows = ((arm, study.baseline, key, *dataclasses.astuple(effect)) for (arm, key), effect in effects.items())
    _write_csv(folder / "effects.csv", ("arm", "baseline", "measure", *names), rows)
    _draw(folder / "compare.png", study, effects)
    _write_text(folder / "compare.md", markdown(study, effects, command) + "\n")
    described = {
        "command": command,
        "conclusion": conclusion(study, effects),
        "baseline": study.baseline,
        "seeds": study.seeds,
        "arms": arms,
    }
    _write_text(folder / "compare.json", json.dumps(described, indent=2, ensure_ascii=False) + "\n")


def _write_text(path: Path, text: str) -> None:
    files.replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence]) -> None:
    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(header)
            writer.writerows(rows)

    files.replace(path, write)


def _draw(path: Path, study: Study, effects: dict[tuple[str, str], Effect]) -> None:
    figure, axes = plt.subplot_mosaic("AAABBB;CCDDEE", figsize=(13, 8.5), layout="constrained")
    colors = {arm: f"C{i % 10}" for i, arm in enumerate(study.curves)}
    for axis, name, title in ((axes["A"], "accuracy", "held-out accuracy"), (axes["B"], "length", "response length")):
        for arm, per_seed in study.curves.items():
            x = per_seed[study.seeds[0]].rollouts
            values = np.array([getattr(curve, name) for curve in per_seed.values()])
            axis.plot(x, values.mean(0), color=colors[arm], label=arm)
            axis.fill_between(x, values.min(0), values.max(0), color=colors[arm], alpha=0.1, linewidth=0)
        axis.set_title(f"{title}: mean and range over {len(study.seeds)} seeds", fontsize=10)
        axis.set_xlabel("rollout")
        axis.grid(alpha=0.3)
    axes["A"].legend(fontsize=8)
    for axis, measure in zip((axes["C"], axes["D"], axes["E"]), MEASURES, strict=True):
        for row, arm in enumerate(reversed(study.others)):
            effect, differences = effects[arm, measure.key], study.differences(arm, measure)
            axis.plot(differences, np.full(len(differences), row), "o", color=colors[arm], alpha=0.35, markersize=4)
            if len(differences) > 1:
                axis.plot([effect.low, effect.high], [row, row], color=colors[arm], linewidth=2)
            axis.plot(effect.mean, row, "D", color=colors[arm], markersize=7)
        axis.axvline(0, color="gray", linewidth=0.8, linestyle="--")
        axis.set_yticks(range(len(study.others)), reversed(study.others) if measure is MEASURES[0] else [])
        axis.set_title(f"{measure.title}, minus {study.baseline}", fontsize=10)
        axis.grid(alpha=0.3, axis="x")
    figure.supxlabel(f"below: one dot a seed; diamond and bar: mean and its {PERCENT} interval", fontsize=9)
    files.replace(path, lambda temporary: figure.savefig(temporary, dpi=110))
    plt.close(figure)


def print_results(console: Console, study: Study, effects: dict[tuple[str, str], Effect]) -> None:
    for rows in (mean_rows(study), effect_rows(study, effects)):
        table = Table(*(escape(title) for title in rows[0]))
        for row in rows[1:]:
            table.add_row(*map(escape, row))
        console.print(table)
    console.print(conclusion(study, effects), markup=False)
