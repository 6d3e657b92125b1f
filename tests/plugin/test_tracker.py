"""The heatmap that goes to Weights & Biases: what it says of a token, and that a hostile token stays text."""

from __future__ import annotations

import html.parser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slime_fipo.algorithm import FipoConfig
from slime_fipo.plugin import tracker
from slime_fipo.records import Fate, StepHeader, TokenRecord

HEADER = StepHeader(4, 1, 3, FipoConfig().as_dict(), "slime", tokenizer="a folder")
HOSTILE = [
    "</span><script>alert(1)</script>",
    "\" onmouseover='x'",
    "&lt;",
    "\u202eabc",
    "\x00\x1b[31m",
    "日本",
    "\n",
    "{{ 7 * 7 }}",
]


def record(length: int, seed: int = 0, **changes) -> TokenRecord:
    rng = np.random.default_rng(seed)
    values = dict(
        position=9,
        group=2,
        reward=0.5,
        prompt=np.arange(3, dtype=np.int32),
        tokens=np.arange(length, dtype=np.int32),
        loss_mask=np.ones(length, dtype=bool),
        shift=rng.normal(size=length).astype(np.float32),
        advantages=rng.normal(size=length).astype(np.float32),
        future_kl=rng.normal(size=length).astype(np.float32),
        influence=rng.uniform(0.8, 1.2, size=length).astype(np.float32),
        fate=np.zeros(length, dtype=np.uint8),
    )
    return TokenRecord(**values | changes)


class Tokens(html.parser.HTMLParser):
    """Titles, styles and text of the page's tokens, and every tag on it."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.tokens, self.open = set(), [], None
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        attributes = dict(attributes)
        self.open = None
        if tag == "span" and attributes.get("title", "").startswith("token "):
            self.open = {"text": "", **attributes}
            self.tokens.append(self.open)

    def handle_data(self, data):
        if self.open is not None:
            self.open["text"] += data

    def handle_endtag(self, tag):
        self.open = None


@settings(deadline=None, max_examples=60)
@given(texts=st.lists(st.one_of(st.sampled_from(HOSTILE), st.text(max_size=12)), min_size=1, max_size=20))
def test_tokens_are_text_whatever_they_hold(texts):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracker, "_texts", lambda header, tokens: [texts[i] for i in tokens])
        page = Tokens(tracker.heatmap(record(len(texts)), HEADER))
    assert page.tags <= {"meta", "style", "h3", "p", "span"}
    plain = [token["text"].replace("\r\n", "\n").replace("\r", "\n") for token in page.tokens]
    assert plain == [text.replace("\r\n", "\n").replace("\r", "\n") for text in texts]


def test_what_a_token_says():
    fate = np.array([0, Fate.CLIPPED_HIGH, Fate.MASKED, Fate.DROPPED | Fate.CAPPED, Fate.NONFINITE], dtype=np.uint8)
    shift = np.array([0.5, 0.1, 0.0, -0.2, np.nan], dtype=np.float32)
    influence = np.array([1.0, 1.2, 1.0, 0.9, 1.0], dtype=np.float32)
    present = np.array([True, True, True, True, False])
    page = Tokens(tracker.heatmap(record(5, fate=fate, shift=shift, influence=influence, present=present), HEADER))
    titles = [token["title"] for token in page.tokens]
    assert len(titles) == 4, "a token of another rank is not shown as if it were known"
    assert titles[0].startswith("token 0, f 1.0000, F ") and "Δ 0.5000" in titles[0]
    assert titles[1].endswith("clipped high") and page.tokens[1]["class"] == "marked"
    assert page.tokens[2]["class"] == "masked"
    assert page.tokens[3]["class"] == "dropped marked" and titles[3].endswith("capped, dropped")
    assert page.tokens[0]["style"].endswith("0.00)"), "a weight of 1 has no colour"
    assert "230,97,1" in page.tokens[1]["style"] and "69,117,180" in page.tokens[3]["style"]
    assert [token["text"] for token in page.tokens] == ["⟨0⟩", "⟨1⟩", "⟨2⟩", "⟨3⟩"], "ids where there is no tokenizer"


@pytest.mark.parametrize("length", [0, 1])
def test_short_responses(length):
    assert len(Tokens(tracker.heatmap(record(length, reward=float("nan")), HEADER)).tokens) == length


def test_it_is_logged_to_an_open_run_alone(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    tracker.show_response(record(3), HEADER)
    assert not list(tmp_path.iterdir()), "no run was opened for it"
    run = wandb.init(project="heatmap", mode="offline", dir=str(tmp_path))
    tracker.show_response(record(3), HEADER)
    logged = dict(run.summary)
    wandb.finish()
    assert logged["train/step"] == 4 * 3 + 1
    [page] = tmp_path.glob("wandb/offline-run-*/files/media/html/train/fipo/heatmap_*.html")
    assert len(Tokens(page.read_text()).tokens) == 3
