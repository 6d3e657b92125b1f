"""The page as a reader uses it: every view with pointer and keyboard, what it says against what was recorded."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from slime_fipo.records import Fate, StepHeader, TokenRecord, read_records, write_step
from slime_fipo.report.command import write_report

from .rig import ALPHABET, CONFIG, make_records, write_rollout

VIEWS = ("trend", "rollout", "response", "whatif", "noise", "incomplete")


@pytest.fixture(scope="module")
def records_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page") / "my run"
    for rollout in (0, 10):
        write_rollout(folder, rollout, seed=rollout, rare=0.02)
    return folder


@pytest.fixture(scope="module")
def report_path(records_folder):
    return write_report([records_folder])[0]


def go(page, view: str, argument: object = None) -> None:
    page.evaluate("([view, argument]) => go(view, argument ?? undefined)", [view, argument])
    page.wait_for_function("view => document.querySelector('nav [aria-current]')?.hash === '#' + view", arg=view)


def record_of(folder, page, index: int) -> TokenRecord:
    wanted = page.evaluate("i => { const r = report.responses[i]; return [r.rollout, r.step, r.position]; }", index)
    records = read_records(folder).records
    return next(r for r in records if [r.header.rollout_id, r.header.step_id, r.position] == wanted)


def readout(page) -> dict[str, str]:
    names, values = (page.locator(f".readout {tag}").all_text_contents() for tag in ("dt", "dd"))
    return dict(zip(names, values, strict=True))


def as_number(text: str) -> float:
    return float(text.replace("−", "-").replace(",", "").replace("%", ""))


def test_every_view_fits(open_page, report_path):
    page = open_page(report_path)
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for width in (1280, 390):
            page.set_viewport_size({"width": width, "height": 800})
            for view in VIEWS:
                go(page, view)
                page.wait_for_timeout(50)
                assert page.locator("h1").inner_text() == page.locator("nav [aria-current]").inner_text()
                assert page.evaluate("document.documentElement.scrollWidth") <= width, view
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.emulate_media(color_scheme="light")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != dark


def test_trend_opens_a_rollout(open_page, report_path):
    page = open_page(report_path)
    page.locator(".chart .plot-container").wait_for()
    assert page.locator("#selection").inner_text().startswith("32 of 32 recorded responses")
    page.evaluate("document.querySelector('.chart').emit('plotly_click', { points: [{ x: 1, data: { meta: 0 } }] })")
    page.wait_for_selector("table.responses")
    assert page.evaluate("report.rollouts[state.rollout].rollout") == 0


def test_the_table_sorts_searches_and_opens(open_page, report_path, records_folder):
    page = open_page(report_path, "#rollout/1")

    def column(name: str) -> list[str]:
        index = page.locator("table.responses th").all_inner_texts()
        at = next(i for i, text in enumerate(index) if text.startswith(name))
        return page.locator(f"table.responses tbody td:nth-child({at + 1})").all_inner_texts()

    assert len(column("position")) == 16
    page.get_by_role("button", name="tokens").press("Enter")
    lengths = [as_number(text) for text in column("tokens")]
    assert lengths == sorted(lengths, reverse=True)
    page.get_by_role("button", name="tokens").press("Enter")
    assert [as_number(text) for text in column("tokens")] == lengths[::-1]

    recorded = [r for r in read_records(records_folder).records if r.header.rollout_id == 10]
    assert sorted(lengths) == sorted(len(r.tokens) for r in recorded)
    means = {str(r.position): r.influence[r.loss_mask & np.isfinite(r.influence)].mean() for r in recorded}
    for position, text in zip(column("position"), column("mean f"), strict=True):
        assert as_number(text) == pytest.approx(means[position], abs=1e-4)

    words = "".join(ALPHABET[t - 1] for t in recorded[3].tokens[5:17]).split("\n")[0]
    page.get_by_label("Find in the text").fill(words)
    assert str(recorded[3].position) in column("position") and len(column("position")) < 16
    page.get_by_role("link", name=f"Open response {recorded[3].position}").press("Enter")
    page.wait_for_selector(".tokens .t")
    assert page.evaluate("report.responses[state.response].position") == recorded[3].position


def test_tokens_say_what_was_recorded(open_page, report_path, records_folder):
    page = open_page(report_path, "#response/20")
    record = record_of(records_folder, page, 20)
    spans = page.locator(".tokens .t")
    assert spans.count() == len(record.tokens)
    classes = [set(c.split()) for c in spans.evaluate_all("spans => spans.map((span) => span.className)")]
    for i, mark in enumerate(classes):
        fate = Fate(int(record.fate[i]))
        assert ("masked" in mark) is (Fate.MASKED in fate)
        if Fate.MASKED in fate:
            continue
        for flag, name in ((Fate.CLIPPED_HIGH, "high"), (Fate.CLIPPED_LOW, "low"), (Fate.CAPPED, "capped")):
            assert (name in mark) is (flag in fate), i
        assert ("excluded" in mark) is (Fate.EXCLUDED in fate) and ("nonfinite" in mark) is (Fate.NONFINITE in fate)
        level = round(8 * float(np.clip((record.influence[i] - 1) / 0.2, -1, 1)))
        assert (
            abs(next((int(c[1:]) * (1 if c[0] == "p" else -1) for c in mark if re.fullmatch(r"[pn]\d", c)), 0) - level)
            < 2
        )

    page.locator(".tokens").focus()
    page.keyboard.press("Home")
    for i in range(3):
        shown = readout(page)
        assert shown["token"] == f"{i + 1} of {len(record.tokens)}"
        assert as_number(shown["F (nats)"]) == pytest.approx(record.future_kl[i], abs=1e-4)
        assert as_number(shown["f"]) == pytest.approx(record.influence[i], abs=1e-4)
        assert as_number(shown["mismatch (nats)"]) == pytest.approx(record.mismatch[i], abs=1e-4)
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Home")
    page.keyboard.press("m")
    marks = np.where(record.loss_mask, record.fate & 0b1001111, 0)
    marked = np.flatnonzero((marks[1:] != 0) & (marks[1:] != marks[:-1])) + 1  # where marks begin or change
    assert readout(page)["token"] == f"{marked[0] + 1} of {len(record.tokens)}"
    page.keyboard.press("ArrowDown")
    below = page.evaluate("state.heatmap.current")
    assert below > marked[0] + 1

    spans.nth(30).hover()
    assert readout(page)["token"].startswith("31 of")


def test_strip_and_text_are_linked(open_page, tmp_path):
    write_step(
        tmp_path,
        StepHeader(0, 0, 1, CONFIG.as_dict(), "local", alphabet=ALPHABET),
        make_records(range(1), lengths=(6000, 6000)),
    )
    page = open_page(write_report([tmp_path])[0], "#response/1")
    box = page.locator("canvas.strip").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.75, box["y"] + 20)
    current = page.evaluate("state.heatmap.current")
    assert current == pytest.approx(4500, abs=12)
    page.wait_for_timeout(100)
    assert page.locator(".tokens .current").evaluate(
        "span => { const a = span.getBoundingClientRect(), b = span.closest('.tokens').getBoundingClientRect();"
        " return a.top >= b.top && a.bottom <= b.bottom; }"
    )
    first, last = page.evaluate("state.heatmap.visibleTokens()")
    assert first < current < last and last - first < 3000
    assert page.locator(".tokens .current").evaluate("span => span.className").startswith("t ")


def test_siblings_by_key(open_page, report_path):
    page = open_page(report_path, "#response/0")
    page.locator(".tokens").focus()
    for expected in (1, 2, 3, 3):
        page.keyboard.press("n")
        page.wait_for_function(
            "i => state.response === i && document.activeElement.classList.contains('tokens')", arg=expected
        )
    page.keyboard.press("p")
    page.wait_for_function("() => state.response === 2")  # an expression would be eval, which the page forbids
    groups = page.evaluate("[0, 2].map((i) => report.responses[i].group)")
    assert groups[0] == groups[1]


def test_first_and_last_step_side_by_side(open_page, tmp_path, report_path):
    first = make_records(range(1), drift=0.0)
    last = [replace(r, influence=r.influence * 0.9) for r in make_records(range(1))]
    for step, records in ((0, first), (3, last)):
        write_step(tmp_path, StepHeader(0, step, 4, CONFIG.as_dict(), "local", alphabet=ALPHABET), records)
    page = open_page(write_report([tmp_path])[0], "#response/5")
    assert page.locator(".tokens").count() == 2
    page.locator(".tokens").first.focus()
    page.keyboard.press("End")
    tokens = [text for text in page.locator(".readout dd:first-of-type").all_inner_texts() if " of " in text]
    assert len(set(tokens)) == 1 and len(tokens) == 2

    page = open_page(report_path, "#response/5")  # other groups at the other step
    assert page.locator(".tokens").count() == 1
    page.get_by_role("heading", name="First and last step of this rollout").wait_for()
    assert page.locator(".chart .plot-container").count() == 2


def test_what_if_recomputes_and_says_what_changes(open_page, report_path):
    page = open_page(report_path, "#whatif")
    cells = "Array.from(document.querySelectorAll('.grid.three tbody tr'), (row) => row.innerText.split('\\t'))"
    before = {row[0]: row[1:] for row in page.evaluate(cells)}
    assert before["mean f"][0] == before["mean f"][1] and before["weights that change"][-1] == "0.0 %"
    colours = "Array.from(document.querySelectorAll('.tokens .t'), (span) => span.className).join()"
    painted = page.evaluate(colours)

    page.get_by_label("τ, half-life in tokens").fill("4")
    page.get_by_label("high only: f is at least 1").check()
    after = {row[0]: row[1:] for row in page.evaluate(cells)}
    assert after["mean f"][0] == before["mean f"][0] and as_number(after["mean f"][1]) > 1
    assert as_number(after["weights that change"][-1]) > 20
    assert page.evaluate(colours) != painted
    flags = page.locator("pre.flags").inner_text()
    assert "--fipo-decay-rate 4 " in flags and "--fipo-clip-high-only" in flags
    page.get_by_label("τ, half-life in tokens").fill("-1")  # not a half-life: the last good value stays
    assert page.get_by_label("τ, half-life in tokens").get_attribute("aria-invalid") is not None
    assert "--fipo-decay-rate 4 " in page.locator("pre.flags").inner_text()
    page.get_by_role("button", name="back to the recorded settings").click()
    assert {row[0]: row[1:] for row in page.evaluate(cells)} == before


def test_verdict_on_noise(open_page, tmp_path):
    cases = {"noise": (0.0, "rollout"), "drift": (0.2, "rollout"), "train": (0.02, "train")}
    for name, (drift, shift_from) in cases.items():
        write_rollout(tmp_path / name, drift=drift, shift_from=shift_from, noise=0.02, rare=0)
    page = open_page(write_report([tmp_path / name for name in cases])[0], "#noise")
    assert page.locator(".verdict h2").all_inner_texts() == [
        "The weights follow engine noise.",
        "The weights follow the policy's drift.",
        "The shift holds no engine mismatch.",
    ]
    advice = ["--fipo-shift-from train" in text for text in page.locator(".verdict").all_inner_texts()]
    assert advice == [True, False, False]


def test_a_one_sided_mismatch_names_the_vocabulary(open_page, tmp_path):
    records = [
        replace(r, mismatch=r.mismatch - np.float32(0.15))
        for r in make_records(range(2), drift=0.0, noise=0.02, rare=0)
    ]
    write_step(tmp_path, StepHeader(0, 0, 1, CONFIG.as_dict(), "slime", shift_from="rollout"), records)
    page = open_page(write_report([tmp_path])[0], "#noise")
    assert "--make-vocab-size-divisible-by 1" in page.locator(".verdict").inner_text()


def test_what_is_missing_is_named_and_left_out(open_page, tmp_path):
    records = make_records(range(1))
    header = StepHeader(0, 0, 4, CONFIG.as_dict(), "slime", cp_size=2, alphabet=ALPHABET)
    halves = [[(0, len(r.tokens) // 2)] for r in records]
    write_step(tmp_path, header, records, halves)
    page = open_page(write_report([tmp_path])[0], "#incomplete")
    sentences = page.locator(".missing li").all_inner_texts()
    assert "rollout 0, step 0: the file of data-parallel rank 0, context-parallel rank 1 is missing" in sentences
    assert "rollout 0: step 3 of 4 is missing" in sentences
    assert page.locator(".badge").inner_text() == str(len(sentences))
    go(page, "whatif")
    assert "nothing can be computed again" in page.locator("#view").inner_text()
    go(page, "response", 0)
    assert page.locator(".tokens .absent").count() == len(records[0].tokens) - len(records[0].tokens) // 2


def test_records_without_a_shift_show_the_mismatch(open_page, tmp_path):
    records = [replace(r, future_kl=None, influence=None, shift=r.shift * 0) for r in make_records(range(2), rare=0)]
    write_step(tmp_path, StepHeader(0, 0, 1, CONFIG.as_dict(), "slime dump", alphabet=ALPHABET), records)
    page = open_page(write_report([tmp_path])[0], "#response/0")
    assert "Δ, F and f are not known" in page.locator("#view").inner_text()
    assert set(readout(page)) >= {"A", "mismatch (nats)"} and "F (nats)" not in readout(page)
    assert page.locator(".tokens .p8, .tokens .n8").count() + page.locator(".tokens .p4, .tokens .n4").count() > 0
    for view in VIEWS:
        go(page, view)
        page.wait_for_timeout(30)
        assert not re.search(r"\b(null|undefined|NaN)\b", page.locator("#view").inner_text()), view


def test_records_without_shift_and_mismatch_show_the_advantage(open_page, tmp_path):
    for step in (0, 3):
        unknown = {"future_kl": None, "influence": None, "mismatch": None}
        records = [replace(r, shift=r.shift * 0, **unknown) for r in make_records(range(step, step + 1), rare=0)]
        write_step(tmp_path, StepHeader(0, step, 4, CONFIG.as_dict(), "slime dump", alphabet=ALPHABET), records)
    page = open_page(write_report([tmp_path])[0], "#response/0")
    page.evaluate("() => { CanvasRenderingContext2D.prototype.fillText = (text) => (window.drawn ??= []).push(text); }")
    page.evaluate("state.heatmap.drawStrip()")
    assert [text.split(":")[0] for text in page.evaluate("drawn")] == ["A"]
    assert "First and last step" not in page.locator("#view").inner_text()  # their distributions are not known
    go(page, "rollout")
    assert "shift not known" in page.locator("#view").inner_text()


def test_trend_legends_do_not_cover_titles(open_page, tmp_path):
    for name in ("one run", "another run", "a third run with a long name"):
        write_rollout(tmp_path / name)
    paths = [tmp_path / name for name in ("one run", "another run", "a third run with a long name")]
    for chosen in (paths[:1], paths):
        path = write_report(chosen, tmp_path / "page.html")[0]
        for width in (390, 1280):
            page = open_page(path, viewport={"width": width, "height": 800})
            page.locator(".groups .traces").first.wait_for(state="attached")
            boxes = "(all) => Array.from(document.querySelectorAll(all), (e) => e.getBoundingClientRect().toJSON())"
            titles, legends = (page.evaluate(boxes, name) for name in (".annotation-text", ".groups .traces"))
            assert titles and legends
            for title in titles:
                for entry in legends:
                    apart = (
                        entry["bottom"] <= title["top"] + 3
                        or entry["top"] >= title["bottom"] - 3
                        or entry["left"] >= title["right"]
                    )
                    assert apart, (width, len(chosen), title, entry)


def test_a_page_without_records(open_page, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"rollout/step": 0, "rollout/raw_reward": 0.5}\n')
    page = open_page(write_report([tmp_path])[0])
    assert "null" not in page.locator("#view").inner_text()
    for view in VIEWS[1:-1]:
        go(page, view)
        assert "No token records were found" in page.locator("#view").inner_text()
