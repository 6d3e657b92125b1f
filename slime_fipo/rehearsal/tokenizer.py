"""Loads the tokenizer of a Hugging Face folder from its files alone, or says in one line why that cannot be done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import UserError

VOCABULARIES = ("tokenizer.json", "vocab.json", "tokenizer.model")


def load_tokenizer(folder: Path, source: Path | None = None) -> Any:
    """transformers' tokenizer of ``folder``.

    Args:
        source: the folder of ``--hf-checkpoint`` that it was copied from.

    Raises:
        UserError: it cannot be loaded; names the flag.
    """
    from transformers import AutoTokenizer

    source = source or folder
    if not any((folder / name).is_file() for name in VOCABULARIES):
        # transformers would take an empty vocabulary, in which every text has no tokens
        raise UserError(
            f"--hf-checkpoint {source} has no tokenizer ({', '.join(VOCABULARIES)}); download its tokenizer files there"
        )
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as problem:  # transformers and tokenizers raise many kinds
        reason = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        raise UserError(
            f"--hf-checkpoint {source}: its tokenizer cannot be read ({reason}); download its tokenizer files again"
        ) from None
