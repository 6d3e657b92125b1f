"""Text from a stranger's model, folder or metrics is shown and does nothing, on the page and on the terminal."""

from __future__ import annotations

import json
import unicodedata
from dataclasses import replace

import numpy as np
import pytest

from slime_fipo.records import StepHeader, write_step
from slime_fipo.records.text import Decoders, visible
from slime_fipo.report.command import print_tokens, write_report

from .rig import CONFIG, make_records

SCRIPT = "window.hacked = true"
TOKENS = [
    f"</script><script>{SCRIPT}</script>",
    f'<img src="x" onerror="{SCRIPT}">',
    f"'\"><svg onload='{SCRIPT}'>",
    "<!--",
    "]]>",
    "{{ 7 * 7 }}{% raw %}",
    "${alert(1)}`",
    "&lt;b&gt;",
    "javascript:alert(1)",
    "[red]bold[/red]",
    "\u202eright-to-left\u202c",
    "\u200f\u2066\u2069\ufeff",
    "\x00\x07\x1b[2J\x1b]0;title\x07\x7f\x9b31m",
    "\u2028\u2029\r",
    "x" * 50_000,
    "مرحبا",
]


def hostile_tokenizer(folder):
    tokenizers = pytest.importorskip("tokenizers", reason="transformers is not installed")
    transformers = pytest.importorskip("transformers")
    model = tokenizers.models.WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token=TOKENS[3])
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model)).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def hostile_run(tmp_path):
    """A run directory all of whose names and tokens are hostile."""
    run = tmp_path / f'<img src=x onerror="{SCRIPT}">'
    records = make_records(range(1), vocabulary=len(TOKENS) - 1, lengths=(60, 60))
    everything = np.arange(len(TOKENS), dtype=np.int32)
    records = [
        replace(record, tokens=np.resize(everything, 60), prompt=everything, position=i)
        for i, record in enumerate(records)
    ]
    header = StepHeader(0, 0, 9, CONFIG.as_dict(), TOKENS[1], tokenizer=hostile_tokenizer(tmp_path / "tokenizer"))
    write_step(run / "records", header, records)
    rows = [{"rollout/step": 0, "rollout/raw_reward": 0.5}, {"eval/step": 0, f"eval/{TOKENS[1].replace('/', '')}": 0.5}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def test_the_page_shows_them_and_nothing_runs(open_page, hostile_run, tmp_path):
    path, _ = write_report([hostile_run], tmp_path / "report.html")
    page = open_page(path, viewport={"width": 390, "height": 800})
    scripts = page.evaluate("document.scripts.length")
    for view in ("trend", "rollout", "response", "whatif", "noise", "incomplete"):
        page.evaluate("view => go(view)", view)
        page.wait_for_timeout(50)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, view
    page.evaluate("go('response')")
    page.wait_for_timeout(50)
    shown = page.evaluate("Array.from(document.querySelectorAll('.tokens .t'), (span) => span.textContent)")
    assert shown[: len(TOKENS)] == [visible(token) for token in TOKENS]
    assert shown[0] == TOKENS[0] and shown[5] == TOKENS[5]
    assert (
        page.evaluate("document.querySelectorAll('img, svg [onload], iframe, object, a[href^=\"javascript\"]').length")
        == 0
    )
    assert page.evaluate("document.scripts.length") == scripts
    assert page.evaluate("window.hacked") is None
    assert page.evaluate("document.querySelector('#runs').textContent") == hostile_run.name


def test_a_script_that_got_in_would_not_run(browser, hostile_run, tmp_path):
    """The policy is a second wall: also without escaping, nothing but the page's own scripts runs."""
    path, _ = write_report([hostile_run], tmp_path / "report.html")
    frame = '<div id="view">'
    html = path.read_text()
    assert html.count(frame) == 1
    path.write_text(html.replace(frame, f"<script>{SCRIPT}</script><img src=x onerror='{SCRIPT}'>{frame}"))
    page = browser.new_page()
    refused = []
    page.on("console", lambda message: refused.append(message.text) if message.type == "error" else None)
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready]")
    assert page.evaluate("window.hacked") is None
    assert any("Executing inline script violates" in text for text in refused)
    assert any("Executing inline event handler violates" in text for text in refused)
    page.close()


def test_the_terminal_gets_no_control_characters(hostile_run, capsys):
    print_tokens([hostile_run], "0:0")
    output = capsys.readouterr().out
    bad = {c for c in output if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp", "Cs")}
    assert bad == set()
    assert "[red]bold[/red]" in output and TOKENS[0] in output


def test_a_tokenizer_with_code_of_its_own_is_not_run(tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    folder, canary = tmp_path / "tokenizer", tmp_path / "canary"
    folder.mkdir()
    (folder / "code.py").write_text(f"import pathlib; pathlib.Path({str(canary)!r}).touch()\nclass T: pass\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["code.T", None]}})
    )
    decoders = Decoders()
    header = StepHeader(0, 0, 1, CONFIG.as_dict(), "local", tokenizer=str(folder))
    pieces = decoders.of(header).pieces(np.array([5, 7]))
    assert [piece.text for piece in pieces] == ["⟨5⟩", "⟨7⟩"]
    assert "cannot be loaded" in decoders.notes[0]
    assert not canary.exists()
