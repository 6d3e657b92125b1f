"""`make bench`: every figure of the README about cost on a CPU, as ratios of things measured in this one run.

Prints one table. A bound that is missed is printed as such and makes the command exit with 1.
"""

import os
import sys
import time

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.listing import paper_listing
from benchmarks.report import figures as report_figures
from slime_fipo import FipoConfig, fipo_weights, future_kl
from tests.algorithm import oracle
from tests.algorithm.memory import peak_extra_bytes


def best_seconds(*calls, repeats=15, warm_up=2):
    """Shortest time of each call, the calls taking turns: what other processes add to a time is never negative."""
    for call in calls:
        for _ in range(warm_up):
            call()
    times = [[] for _ in calls]
    for _ in range(repeats):
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return [min(taken) for taken in times]


def shift_of(lengths, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 0.05, sum(lengths)).astype(np.float32))


def milliseconds(seconds):
    return f"{seconds * 1e3:.2f} ms"


def main() -> int:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    table = Table(title=f"slime-fipo on CPU, torch {torch.__version__}, {torch.get_num_threads()} threads, float32")
    for column in ("what", "measured", "bound", ""):
        table.add_column(column)
    missed = []

    def report(what, value, bound, text, at_least=False):
        good = value >= bound if at_least else value <= bound
        if not good:
            missed.append(what)
        table.add_row(what, text, f"{'≥' if at_least else '≤'} {bound:g}", "ok" if good else "MISSED")

    # 1. The paper's listing against the scan, and both against float64.
    batch, length = 8, 20480
    shift = shift_of([length] * batch)
    padded = shift.view(batch, length)
    lengths = [length] * batch
    [scan] = best_seconds(lambda: future_kl(shift, lengths, 32.0), repeats=30)
    [listing] = best_seconds(lambda: paper_listing(padded, 32.0), repeats=3, warm_up=1)
    times = f"{milliseconds(listing)} / {milliseconds(scan)}"
    report("speed-up over the paper's listing, 8×20480", listing / scan, 1000, f"{listing / scan:.0f}× ({times})", True)
    for decay_rate in (32.0, 4096.0):
        exact = oracle.future_kl(shift.numpy(), lengths, decay_rate)

        def error(values, exact=exact):
            return np.abs(values.double().numpy().ravel() - exact).max() / np.abs(exact).max()

        ours, theirs = error(future_kl(shift, lengths, decay_rate)), error(paper_listing(padded, decay_rate))
        report(
            f"largest error, τ = {decay_rate:g} (of the largest |F|)", ours, 1e-5, f"{ours:.1e} (listing {theirs:.1e})"
        )

    # 2. Linear in the tokens.
    few, many = [2500] * 100, [25000] * 160
    small, large = shift_of(few), shift_of(many)
    low, high = best_seconds(lambda: future_kl(small, few, 32.0), lambda: future_kl(large, many, 32.0))
    report(
        "time for 16× the tokens (250k → 4M)",
        high / low,
        24,
        f"{high / low:.1f}× ({milliseconds(low)} → {milliseconds(high)})",
    )

    # 3. Pay for the tokens that exist: one long response and 63 of 100 tokens, against 20 equal ones.
    ragged = [20480] + [100] * 63
    equal = [sum(ragged) // 20] * 19
    equal.append(sum(ragged) - sum(equal))
    tokens = shift_of(ragged)
    one, other = best_seconds(
        lambda: future_kl(tokens, ragged, 32.0), lambda: future_kl(tokens, equal, 32.0), repeats=41
    )
    report("ragged (1×20480 + 63×100) against 20 equal", one / other, 1.5, f"{one / other:.2f}×")

    # 4. Peak extra memory.
    log_probs = tokens - 1
    old, advantages, mask = torch.full_like(tokens, -1.0), torch.randn_like(tokens), torch.ones_like(tokens)
    per_token = 4 * len(tokens)
    extra = peak_extra_bytes(lambda: future_kl(tokens, ragged, 32.0)) / per_token
    report("peak extra floats per token, future_kl", extra, 10, f"{extra:.1f}")
    extra = peak_extra_bytes(lambda: fipo_weights(log_probs, old, advantages, mask, ragged, FipoConfig())) / per_token
    report("peak extra floats per token, fipo_weights", extra, 10, f"{extra:.1f}")

    # 5. The report page, in a browser.
    for what, value, bound, text in report_figures():
        report(what, value, bound, text)

    Console(width=max(110, Console().width)).print(table)
    for what in missed:
        print(f"missed: {what}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
