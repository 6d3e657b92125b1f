"""The report page at full size: 64 responses of 10,240 tokens, built in a process of its own and opened in Chromium.

``python -m benchmarks.report`` prints the figures by themselves; ``make bench`` has them in its table.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from playwright.sync_api import sync_playwright

from slime_fipo.records import StepHeader, write_step
from tests.report.rig import CONFIG, chromium, make_records

RESPONSES, TOKENS, VOCABULARY = 64, 10_240, 30_000
BUILD = """
import resource, sys, time
start = time.perf_counter()
from pathlib import Path
from slime_fipo.report.command import write_report
write_report([Path(sys.argv[1])], Path(sys.argv[2]))
print(time.perf_counter() - start, time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
WHAT_IFS = 9
# Median of several what-ifs over everything: weights, sums, both histograms and the open heatmap.
WHAT_IF = """(count) => {
  const times = [];
  for (let i = 0; i < count; i++) {
    const start = performance.now();
    whatIf.apply({ decay_rate: 20 + 8 * i, clip_high_only: i % 2 === 1 });
    document.body.getBoundingClientRect();
    times.push(performance.now() - start);
  }
  return times.sort((a, b) => a - b)[count >> 1];
}"""


def figures() -> Iterator[tuple[str, float, float, str]]:
    """What was measured, its value, the upper bound, and the value as text.

    Bounds are on wall-clock time; the text has processor time beside it, which other processes do not add to.
    """
    with tempfile.TemporaryDirectory() as folder:
        records, page = Path(folder, "records"), Path(folder, "report.html")
        write_records(records, Path(folder, "tokenizer"))
        built = subprocess.run(
            [sys.executable, "-c", BUILD, str(records), str(page)], check=True, capture_output=True, text=True
        )
        seconds, busy, peak = map(float, built.stdout.split())
        yield "report of 64×10,240 tokens: built in (s)", seconds, 30, f"{seconds:.1f} s (processor {busy:.1f} s)"
        yield "… peak memory (GB)", peak / 1e9, 2, f"{peak / 1e9:.2f} GB"
        size = page.stat().st_size
        yield "… size (MB)", size / 1e6, 25, f"{size / 1e6:.1f} MB"
        (opened, open_busy), (what_if, what_if_busy) = in_browser(page)
        yield "… opened in (s)", opened, 3, f"{opened:.2f} s (main thread {open_busy:.2f} s)"
        yield "… a what-if over all of it (ms)", what_if, 150, f"{what_if:.0f} ms (main thread {what_if_busy:.0f} ms)"


def write_records(folder: Path, tokenizer: Path) -> None:
    """First and last step of one rollout, with words as tokens."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    words = {"\n": 0}
    while len(words) < VOCABULARY + 1:
        words.setdefault(" " + "".join(rng.choice(letters, rng.integers(1, 9))), len(words))
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="\n"))).save_pretrained(
        tokenizer
    )
    groups = RESPONSES // 2 // 4
    for step, drift in ((0, 0.0), (3, 0.01)):
        header = StepHeader(0, step, 4, CONFIG.as_dict(), "slime", shift_from="rollout", tokenizer=str(tokenizer))
        made = make_records(
            range(step * groups, (step + 1) * groups),
            lengths=(TOKENS, TOKENS),
            vocabulary=VOCABULARY,
            drift=drift,
            rare=1e-4,
        )
        for record in made:
            record.tokens[rng.random(TOKENS) < 0.02] = 0  # line breaks
        write_step(folder, header, made)


def in_browser(path: Path) -> tuple[tuple[float, float], tuple[float, float]]:
    """Seconds from the address to the first whole view, and milliseconds of a what-if: wall clock, main thread."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        opened = []
        for _ in range(3):
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            session = page.context.new_cdp_session(page)
            session.send("Performance.enable", {"timeDomain": "threadTicks"})
            page.goto(path.as_uri())
            page.wait_for_selector("html[data-ready]")
            wall = page.evaluate("Number(document.documentElement.dataset.ready)") / 1e3
            opened.append((wall, main_thread(session)))
        page.evaluate("go('whatif')")
        page.wait_for_function("() => whatIf.apply !== undefined")
        page.wait_for_timeout(500)
        before = main_thread(session)
        what_if = page.evaluate(WHAT_IF, WHAT_IFS)
        busy = (main_thread(session) - before) / WHAT_IFS * 1e3
        browser.close()
    return min(opened), (what_if, busy)


def main_thread(session) -> float:
    """Seconds that the page's main thread has run."""
    metrics = session.send("Performance.getMetrics")["metrics"]
    return next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration")


if __name__ == "__main__":
    for what, _, bound, text in figures():
        print(f"{what}: {text} (≤ {bound})")
