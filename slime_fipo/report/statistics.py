"""Sums over everything that was recorded, also over responses whose tokens do not go onto the page.

Per response one row of a table, per optimizer step histograms by the advantage's sign, per rollout the verdict on
noise, and the trend's panels. Averages are over trained tokens that are present.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch

from ..algorithm import FipoConfig, fipo_weights
from ..records import Fate, TokenRecord
from .inputs import Run
from .metrics import series

BINS = 60
SIGNS = {"A > 0": 1, "A = 0": 0, "A < 0": -1}
QUANTITIES = ("shift", "future_kl", "influence")
PERCENTILES = (1, 50, 99, 99.9)
# Future-KL of the mismatch over Future-KL of the last step, both as the mean |F|.
ALIKE, LARGE_PART = 0.7, 0.35


def trained_tokens(record: TokenRecord) -> np.ndarray:
    """[T] bool: trained, and present."""
    return record.loss_mask & record.present


def values_of(record: TokenRecord, quantity: str) -> np.ndarray | None:
    """Finite values on trained tokens, or None where the quantity is not known."""
    if record.influence is None and quantity in QUANTITIES:  # then the shift is not known either
        return None
    values = getattr(record, quantity)
    if values is None:
        return None
    values = values[trained_tokens(record)]
    return values[np.isfinite(values)]


def mean(values: np.ndarray | None) -> float | None:
    return float(values.mean(dtype=np.float64)) if values is not None and len(values) else None


def response_row(record: TokenRecord) -> dict:
    """One response in the rollout's table. Shares are of trained tokens."""
    trained = trained_tokens(record)
    fate, count = record.fate[trained], max(1, int(trained.sum()))
    f, future = values_of(record, "influence"), values_of(record, "future_kl")

    def share(flags: Fate) -> float:
        return float(((fate & flags) != 0).sum()) / count

    return {
        "position": record.position,
        "group": record.group,
        "reward": record.reward if np.isfinite(record.reward) else None,
        "advantage": mean(values_of(record, "advantages")),
        "length": len(record.tokens),
        "trained": int(trained.sum()),
        "absent": int((~record.present).sum()),
        "f": mean(f),
        "f_min": float(f.min()) if f is not None and len(f) else None,
        "f_max": float(f.max()) if f is not None and len(f) else None,
        "deviation": mean(np.abs(f - 1)) if f is not None else None,
        "future_kl": mean(np.abs(future)) if future is not None else None,
        "clipped": share(Fate.CLIPPED_HIGH | Fate.CLIPPED_LOW) if f is not None else None,
        "capped": share(Fate.CAPPED) if f is not None else None,
        "excluded": share(Fate.EXCLUDED) if f is not None else None,
        "nonfinite": int(((fate & Fate.NONFINITE) != 0).sum()),
        "dropped": bool((record.fate & Fate.DROPPED).any()),
    }


def histograms(steps: dict[int, Sequence[TokenRecord]]) -> dict:
    """Per quantity the bin edges, and per step and advantage's sign the counts and percentiles.

    All steps of a rollout share the edges, so that they can be laid over each other. The outermost bins hold everything
    beyond the 0.05th and 99.95th percentile.
    """
    result = {}
    for quantity in QUANTITIES:
        parts = {step: _by_sign(records, quantity) for step, records in steps.items()}
        everything = [values for by_sign in parts.values() for values in by_sign.values()]
        everything = np.concatenate(everything) if everything else np.zeros(0)
        if not len(everything):
            continue
        edges = bin_edges(everything)
        result[quantity] = {
            "edges": edges.tolist(),
            "steps": {
                step: {
                    sign: {
                        "counts": np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0].tolist(),
                        "percentiles": np.percentile(values, PERCENTILES).tolist(),
                        "tokens": len(values),
                    }
                    for sign, values in by_sign.items()
                    if len(values)
                }
                for step, by_sign in parts.items()
            },
        }
    return result


def bin_edges(values: np.ndarray) -> np.ndarray:
    low, high = np.percentile(values.astype(np.float64), (0.05, 99.95))
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    return np.linspace(low, high, BINS + 1)


def _by_sign(records: Sequence[TokenRecord], quantity: str) -> dict[str, np.ndarray]:
    parts = {sign: [np.zeros(0, np.float32)] for sign in SIGNS}
    for record in records:
        if record.influence is None:
            continue
        values = getattr(record, quantity)
        usable = trained_tokens(record) & np.isfinite(values)
        for sign, number in SIGNS.items():
            parts[sign].append(values[usable & (np.sign(record.advantages) == number)])
    return {sign: np.concatenate(values) for sign, values in parts.items()}


def noise(steps: dict[int, Sequence[TokenRecord]], last: int) -> dict | None:
    """Future-KL that the mismatch would give by itself, beside Future-KL of the rollout's last step.

    Args:
        steps: the rollout's records by step.
        last: number of the rollout's last step.

    Returns:
        None where no record holds the mismatch. ``verdict`` is ``noise``, ``mixed`` or ``drift`` (see ``ALIKE``),
        ``none`` where the shift holds no mismatch, ``unknown`` where the last step's Future-KL is not there.
    """
    records = [r for step in steps.values() for r in step if r.mismatch is not None and trained_tokens(r).any()]
    if not records:
        return None
    config = FipoConfig(**records[0].header.config)
    future, clipped = _of_mismatch(records, config)
    mismatch = np.concatenate([values_of(r, "mismatch") for r in records])
    final = [r for r in steps.get(last, ()) if r.future_kl is not None and trained_tokens(r).any()]
    shift_from = records[0].header.shift_from
    result = {
        "mismatch": float(np.abs(mismatch).mean()),
        "bias": float(mismatch.mean()),
        "spread": float(mismatch.std()),
        "noise": float(np.abs(future).mean()),
        "noise_clipped": clipped,
        "decay_rate": config.decay_rate,
        "shift_from": shift_from,
        "responses": len(records),
        "last": last,
        "histogram": None,
        "final": None,
    }
    verdict = "unknown"
    if final:
        ours = np.concatenate([values_of(r, "future_kl") for r in final])
        result["final"] = float(np.abs(ours).mean())
        result["final_clipped"] = mean(
            np.concatenate(
                [(r.fate[trained_tokens(r)] & (Fate.CLIPPED_HIGH | Fate.CLIPPED_LOW)) != 0 for r in final]
            ).astype(np.float32)
        )
        result["ratio"] = result["noise"] / result["final"] if result["final"] > 0 else None
        edges = bin_edges(np.concatenate([ours, future]))
        result["histogram"] = {
            "edges": edges.tolist(),
            "noise": _shares(future, edges),
            "final": _shares(ours, edges),
        }
        if shift_from != "rollout":
            verdict = "none"
        elif result["ratio"] is None or result["ratio"] >= ALIKE:
            verdict = "noise"
        else:
            verdict = "mixed" if result["ratio"] >= LARGE_PART else "drift"
    elif shift_from != "rollout" and any(r.future_kl is not None for r in records):
        verdict = "none"
    return result | {"verdict": verdict}


def _shares(values: np.ndarray, edges: np.ndarray) -> list[float]:
    return (np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0] / max(1, len(values))).tolist()


def _of_mismatch(records: Sequence[TokenRecord], config: FipoConfig) -> tuple[np.ndarray, float]:
    """F of the mismatch on trained tokens, and the share of weights that it would clip."""
    packed = torch.from_numpy(np.concatenate([r.mismatch for r in records]))
    mask = np.concatenate([trained_tokens(r) for r in records])
    advantages = torch.from_numpy(np.concatenate([r.advantages for r in records]))
    result = fipo_weights(
        packed,
        torch.zeros_like(packed),
        advantages,
        torch.from_numpy(mask),
        [len(r.tokens) for r in records],
        config,
        metrics=("clip_high_frac", "clip_low_frac"),
    )
    clipped = sum(result.metrics.values()).numpy()[mask] > 0
    return result.future_kl.numpy()[mask], float(clipped.mean())


# A panel of the trend: title, then the metrics in it; {eval} stands for each evaluation's name.
_PANELS = (
    ("Reward or accuracy", (("rollout/raw_reward", "reward of rollouts"), ("{eval}", "{eval}"))),
    (
        "Response length (tokens)",
        (("rollout/response_len/mean", "rollouts"), ("{eval}/response_len/mean", "{eval}")),
    ),
    ("Mean |f − 1|", (("fipo/influence_deviation", "|f − 1|"),)),
    (
        "Share of weights clipped",
        (("fipo/clip_high_frac", "at the upper bound"), ("fipo/clip_low_frac", "at the lower bound")),
    ),
    ("PPO clip (share of tokens)", (("train/pg_clipfrac", "PPO clip"),)),
    ("Entropy (nats)", (("train/entropy_loss", "entropy"),)),
    (
        "Drift and mismatch (nats)",
        (
            ("records/drift", "mean |Δ| at the last step, recorded"),
            ("records/mismatch", "mean |mismatch|, recorded"),
            ("train/train_rollout_logprob_abs_diff", "mean |mismatch|, logged"),
            ("train/ppo_kl", "PPO KL, logged"),
        ),
    ),
)


def trend(run: Run) -> list[dict]:
    """The panels of one run: ``{"title", "series": [{"label", "x", "y"}]}`` over rollouts."""
    rows = run.rows + _rows_of_records(run)
    evaluations = sorted({name for row in rows if "eval/step" in row for name in row if name.count("/") == 1})
    evaluations = [
        name
        for name in evaluations
        if name.startswith("eval/") and name != "eval/step" and not name.endswith("-truncated_ratio")
    ]
    panels = []
    for title, lines in _PANELS:
        found = []
        for name, label in lines:
            for full, shown in {(name.format(eval=e), label.format(eval=e)) for e in evaluations or [""]}:
                axis = "eval/step" if full.startswith("eval/") else "rollout/step"
                x, y = series(rows, axis, full)
                if x:
                    found.append({"label": shown, "x": x, "y": [v if np.isfinite(v) else None for v in y]})
        panels.append({"title": title, "series": sorted(found, key=lambda line: line["label"])})
    return panels


def _rows_of_records(run: Run) -> list[dict]:
    """What records say about each rollout's last recorded step; only names that the run's own rows do not have."""
    logged = {name for row in run.rows for name in row}
    by_step: dict[int, dict[int, list[TokenRecord]]] = defaultdict(lambda: defaultdict(list))
    for record in run.records:
        by_step[record.header.rollout_id][record.header.step_id].append(record)
    rows = []
    for rollout, steps in sorted(by_step.items()):
        recorded = [response_row(record) for step in steps.values() for record in step]
        last = steps[max(steps)]
        final = [response_row(record) for record in last]
        flags = {"fipo/clip_high_frac": Fate.CLIPPED_HIGH, "fipo/clip_low_frac": Fate.CLIPPED_LOW}
        known = [record for record in last if record.influence is not None]
        row = {
            "rollout/raw_reward": _mean_of(recorded, "reward"),
            "rollout/response_len/mean": _mean_of(recorded, "length"),
            "fipo/influence_deviation": _mean_of(final, "deviation"),
            "records/drift": _mean_abs(last, "shift"),
            "records/mismatch": _mean_abs([r for step in steps.values() for r in step], "mismatch"),
        }
        for name, flag in flags.items():
            tokens = [(record.fate[trained_tokens(record)] & flag) != 0 for record in known]
            row[name] = mean(np.concatenate(tokens).astype(np.float32)) if tokens else None
        rows.append(
            {"rollout/step": rollout}
            | {name: value for name, value in row.items() if value is not None and name not in logged}
        )
    return rows


def _mean_of(rows: list[dict], name: str) -> float | None:
    values = [row[name] for row in rows if row[name] is not None]
    return sum(values) / len(values) if values else None


def _mean_abs(records: Sequence[TokenRecord], quantity: str) -> float | None:
    values = [v for r in records if (v := values_of(r, quantity)) is not None]
    return mean(np.abs(np.concatenate(values))) if values else None
