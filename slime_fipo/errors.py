"""What the user got wrong: one exception, and the argument parser that raises it. Only ``cli.py`` prints it."""

from __future__ import annotations

import argparse


class UserError(ValueError):
    """Something the user gave cannot be used. The message is one line that names the flag or the file and the fix."""


class OneLineParser(argparse.ArgumentParser):
    """Errors are raised as :class:`UserError`, without the usage text. Flags cannot be abbreviated, as in Megatron."""

    def __init__(self, **options) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str):
        raise UserError(message)
