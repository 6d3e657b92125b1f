"""What the user got wrong: one exception, and the argument parser that raises it. Only ``cli.py`` prints it."""

from __future__ import annotations

import argparse
import difflib

_UNKNOWN = "unrecognized arguments: "


class UserError(ValueError):
    """Something the user gave cannot be used. The message is one line that names the flag or the file and the fix."""


class OneLineParser(argparse.ArgumentParser):
    """Errors are raised as :class:`UserError`, without the usage text. Flags cannot be abbreviated, as in Megatron."""

    def __init__(self, **options) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str):
        if message.startswith(_UNKNOWN):
            flag = message.removeprefix(_UNKNOWN).partition(" ")[0].partition("=")[0]
            close = difflib.get_close_matches(flag.lower().replace("_", "-"), self._option_string_actions, 1, 0.8)
            message += f"; did you mean {close[0]}?" if close else "; --help lists the flags"
        raise UserError(message)
