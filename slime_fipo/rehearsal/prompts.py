"""The user's prompts through the user's tokenizer, as slime does it: how long they get, against the limits."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ..check.file_rules import chosen_rows, sliced_path
from ..errors import UserError
from .tokenizer import load_tokenizer

MOST_ROWS = 20_000
BATCH = 1000


@dataclass(frozen=True)
class PromptLengths:
    """Tokens of every prompt that was looked at, and whether there are more."""

    tokens: list[int]
    all_rows: bool

    def over(self, limit: int | None) -> int:
        """How many are longer than ``limit``."""
        return 0 if limit is None else sum(length > limit for length in self.tokens)


def prompt_lengths(args: argparse.Namespace) -> PromptLengths:
    """Lengths of the prompts of ``--prompt-data``, at most :data:`MOST_ROWS` of them.

    Raises:
        UserError: they cannot be read or tokenized; names the flag.
    """
    folder = Path(args.hf_checkpoint)
    tokenizer = load_tokenizer(folder)
    if args.apply_chat_template and not tokenizer.chat_template:
        raise UserError(
            f"--apply-chat-template: the tokenizer in --hf-checkpoint {folder} has no chat template; add"
            " chat_template.jinja there, or drop the flag"
        )
    path, bounds = sliced_path(args.prompt_data)
    lengths, rows = [], chosen_rows(path, bounds)
    try:
        texts = _texts(islice(rows, MOST_ROWS), args, tokenizer)
        while batch := list(islice(texts, BATCH)):
            lengths += map(len, tokenizer(batch, add_special_tokens=False)["input_ids"])
        more = next(rows, None) is not None
    except (OSError, ValueError) as error:
        raise UserError(f"--prompt-data {path} {_one_line(error)}") from None
    if not lengths:
        raise UserError(f"--prompt-data {args.prompt_data} has no rows; fix the file")
    return PromptLengths(lengths, not more)


def _texts(rows: Iterator[tuple[int, dict]], args: argparse.Namespace, tokenizer: Any) -> Iterator[str]:
    options = json.loads(args.apply_chat_template_kwargs or "{}")
    for number, row in rows:
        if args.input_key not in row:
            raise ValueError(f"has no --input-key {args.input_key} in row {number}; name its key")
        prompt = row[args.input_key]
        if not args.apply_chat_template:
            if not isinstance(prompt, str):
                raise ValueError(
                    f"has messages in row {number}, which slime hands to the tokenizer as they are; add"
                    " --apply-chat-template"
                )
            yield prompt
            continue
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        try:
            yield tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
        except Exception as error:  # a template raises whatever its author wrote
            raise ValueError(
                f"row {number} does not fit the chat template of --hf-checkpoint ({_one_line(error)})"
            ) from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
