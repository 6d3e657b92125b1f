"""Token ids as text: characters that tokens split, alphabets, and ids where no tokenizer is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slime_fipo.records import StepHeader
from slime_fipo.records.text import CONTINUATION, MAX_CHARACTERS, SPECIAL, Decoder, Decoders, Piece, visible

from ..report.rig import CONFIG


def header(**values) -> StepHeader:
    return StepHeader(0, 0, 1, CONFIG.as_dict(), "local", **values)


@given(st.text(max_size=40), st.lists(st.integers(1, 5), min_size=1, max_size=200))
def test_text_cut_into_bytes_anywhere_is_read_again(text, sizes):
    raw, parts, at = text.encode("utf-8", "surrogatepass"), [], 0
    text = raw.decode("utf-8", "surrogateescape")
    while at < len(raw):
        size = sizes[len(parts) % len(sizes)]
        parts.append(raw[at : at + size])
        at += size
    pieces = Decoder(lambda token: parts[token]).pieces(np.arange(len(parts)))
    assert len(pieces) == len(parts) and [piece.token for piece in pieces] == list(range(len(parts)))
    assert "".join(p.text for p in pieces if p.kind != CONTINUATION) == "".join(visible(c) for c in text)
    assert all(piece.text == "·" for piece in pieces if piece.kind == CONTINUATION)


def test_bytes_that_are_no_text_are_shown_as_bytes():
    pieces = Decoder(lambda token: [b"\xff", b"\xe5", b"a", b"\xe5\xa5", b"\xbd!"][token]).pieces(np.arange(5))
    assert [piece.text for piece in pieces] == ["⟨FF⟩", "⟨E5⟩", "a", "好", "!"]


def test_a_long_token_is_cut_and_says_so():
    assert visible("x" * 50_000).endswith(f"…⟨{50_000 - MAX_CHARACTERS} more characters⟩")


def test_an_alphabet():
    pieces = Decoders().of(header(alphabet="ab\n")).pieces(np.array([1, 2, 3, 0, 9]))
    assert [piece.text for piece in pieces] == ["a", "b", "↵\n", "⟨end⟩", "⟨9⟩"]
    assert [piece.kind for piece in pieces] == [0, 0, 0, SPECIAL, SPECIAL]


@pytest.mark.parametrize(
    ("folder", "says"), [(None, "name no tokenizer"), ("/nowhere", "/nowhere is not on this machine")]
)
def test_ids_where_no_tokenizer_is(folder, says):
    decoders = Decoders()
    assert decoders.of(header(tokenizer=folder)).pieces(np.array([12])) == [Piece(12, "⟨12⟩", SPECIAL)]
    assert says in decoders.notes[0] and "--tokenizer DIR" in decoders.notes[0]


def test_byte_level_bpe(tmp_path):
    """A real byte-level vocabulary without merges: every token is one byte of the text."""
    tokenizers = pytest.importorskip("tokenizers", reason="transformers is not installed")
    transformers = pytest.importorskip("transformers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.save_pretrained(tmp_path)
    text = " 好 ok\n🙂é"
    ids = [*tokenizer.encode(text).ids, fast.eos_token_id]
    decoder = Decoders(tmp_path).of(header(alphabet="ignored"))
    assert decoder.text(np.array(ids)) == " 好 ok↵\n🙂é<|end|>"
    assert decoder.pieces(np.array(ids))[-1] == Piece(fast.eos_token_id, "<|end|>", SPECIAL)
