"""Token ids as text that is safe to show: on a page, on a terminal, also where a token is half a character.

A tokenizer is only ever read from a folder that exists, and never with code of its own.
"""

from __future__ import annotations

import functools
import importlib.util
import unicodedata
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from .schema import StepHeader

TEXT, CONTINUATION, SPECIAL = 0, 1, 2  # kinds of piece
MAX_CHARACTERS = 300  # of one token; what is longer is cut, and says so


class Piece(NamedTuple):
    """How one token is shown.

    Args:
        token: its id.
        text: printable; line breaks alone are kept, each behind a ``↵``.
        kind: ``TEXT``; ``CONTINUATION``, the rest of a character that an earlier token began (``text`` is ``·``);
            ``SPECIAL``, a control token or a bare id, which is not text of the response.
    """

    token: int
    text: str
    kind: int = TEXT


def visible(text: str) -> str:
    """``text`` with everything that cannot be seen, or that changes how its surroundings are shown, spelled out."""
    shown = "".join(map(_visible_character, text[:MAX_CHARACTERS]))
    cut = len(text) - MAX_CHARACTERS
    return f"{shown}…⟨{cut} more characters⟩" if cut > 0 else shown


def _visible_character(character: str) -> str:
    code = ord(character)
    if character == "\n":
        return "↵\n"
    if character == "\t":
        return "→\t"
    if code < 0x20:
        return chr(0x2400 + code)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8, as "surrogateescape" decodes it
        return f"⟨{code - 0xDC00:02X}⟩"
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
        return f"⟨U+{code:04X}⟩"
    return character


class Decoder:
    """Token ids to pieces.

    Args:
        raw: what a token id stands for: bytes where the vocabulary is one of bytes, else a finished :class:`Piece`.
    """

    def __init__(self, raw: Callable[[int], bytes | Piece]):
        self._raw = functools.cache(raw)
        self._whole = functools.cache(self._whole_piece)

    def pieces(self, tokens: np.ndarray) -> list[Piece]:
        """One piece per token; a character split over several tokens is shown at the token it begins in."""
        tokens = tokens.tolist()
        pieces = list(map(self._whole, tokens))
        if None not in pieces:
            return pieces
        result = []
        for is_broken, pairs in groupby(zip(tokens, pieces, strict=True), lambda pair: pair[1] is None):
            run = list(pairs)
            result += _joined([(token, self._raw(token)) for token, _ in run]) if is_broken else [p for _, p in run]
        return result

    def text(self, tokens: np.ndarray) -> str:
        """The pieces' text in one string, without continuation marks."""
        return "".join(piece.text for piece in self.pieces(tokens) if piece.kind != CONTINUATION)

    def _whole_piece(self, token: int) -> Piece | None:
        """None where the token's bytes are UTF-8 only together with its neighbours'."""
        raw = self._raw(token)
        if isinstance(raw, Piece):
            return raw
        try:
            return _piece(token, raw.decode("utf-8"))
        except UnicodeDecodeError:
            return None


def _piece(token: int, text: str) -> Piece:
    return Piece(token, visible(text)) if text else Piece(token, f"⟨{token}⟩", SPECIAL)


def _joined(broken: list[tuple[int, bytes]]) -> list[Piece]:
    """Pieces of consecutive tokens that are UTF-8 only together."""
    texts = [""] * len(broken)
    owners = [i for i, (_, raw) in enumerate(broken) for _ in raw]
    at = 0
    for character in b"".join(raw for _, raw in broken).decode("utf-8", "surrogateescape"):
        texts[owners[at]] += character
        at += len(character.encode("utf-8", "surrogateescape"))
    return [
        Piece(token, visible(text)) if text else Piece(token, "·", CONTINUATION)
        for (token, _), text in zip(broken, texts, strict=True)
    ]


class Decoders:
    """The decoder of each record's header, and one sentence for each tokenizer that could not be used.

    Args:
        tokenizer: a folder that wins over what the headers name.

    Raises:
        UserError: ``tokenizer`` is not a folder.
    """

    def __init__(self, tokenizer: Path | None = None):
        if tokenizer is not None and not tokenizer.is_dir():
            raise UserError(f"--tokenizer {tokenizer} is not a folder; give the folder of the checkpoint's tokenizer")
        self._override = tokenizer
        self._known: dict = {}
        self.notes: list[str] = []

    def of(self, header: StepHeader) -> Decoder:
        folder = str(self._override) if self._override is not None else header.tokenizer
        key = (folder, header.alphabet)
        if key not in self._known:
            self._known[key] = self._make(folder, header.alphabet)
        return self._known[key]

    def _make(self, folder: str | None, alphabet: str | None) -> Decoder:
        if folder is None and alphabet is not None:
            return Decoder(lambda token: _of_alphabet(alphabet, token))
        if folder is None:
            self.notes.append("Tokens are shown as ids: the records name no tokenizer; --tokenizer DIR gives one.")
        elif not Path(folder).is_dir():
            self.notes.append(
                f"Tokens are shown as ids: the tokenizer {folder} is not on this machine; --tokenizer DIR gives one."
            )
        elif importlib.util.find_spec("transformers") is None:
            self.notes.append("Tokens are shown as ids: transformers is not installed (pip install transformers).")
        else:
            try:
                return Decoder(_of_tokenizer(folder))
            except Exception as error:  # a stranger's folder: whatever it is, the ids can still be shown
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                self.notes.append(f"Tokens are shown as ids: the tokenizer in {folder} cannot be loaded ({reason}).")
        return Decoder(lambda token: Piece(token, f"⟨{token}⟩", SPECIAL))


def _of_alphabet(alphabet: str, token: int) -> Piece:
    if token == 0:
        return Piece(token, "⟨end⟩", SPECIAL)
    return _piece(token, alphabet[token - 1] if 0 < token <= len(alphabet) else "")


def _of_tokenizer(folder: str) -> Callable[[int], bytes | Piece]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    added = {token: str(value) for token, value in getattr(tokenizer, "added_tokens_decoder", {}).items()}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    of_bytes = backend is not None and "ByteLevel" in repr(backend.decoder)

    def raw(token: int) -> bytes | Piece:
        if token in added:
            return Piece(token, visible(added[token]), SPECIAL)
        piece = tokenizer.convert_ids_to_tokens(token) if token >= 0 else None
        if not isinstance(piece, str):
            return Piece(token, f"⟨{token}⟩", SPECIAL)
        if of_bytes and all(c in _BYTE_OF for c in piece):
            return bytes(_BYTE_OF[c] for c in piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):  # SentencePiece's byte fallback
            return bytes([int(piece[3:5], 16)])
        return piece.replace("▁", " ").encode("utf-8", "surrogatepass")

    return raw


def _bytes_of_characters() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, the vocabulary of byte-level BPE."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF = _bytes_of_characters()
