"""Flags of the soft overlong penalty, which slime has none of. The penalty itself lives in ``reward.py``.

``python3 -m slime_fipo`` adds them to slime's parser; a plain slime reads the same names from ``--custom-config-path``.
"""

from __future__ import annotations

import argparse

RECIPE_DESTS = ("overlong_buffer_len", "overlong_penalty_factor")


def add_recipe_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the soft overlong penalty's group (DAPO, arXiv:2503.14476, Eq. 13) to ``parser`` and return the parser."""
    group = parser.add_argument_group("Overlong penalty", "read by slime_fipo.recipes.reward.dapo_math_reward")
    group.add_argument(
        "--overlong-buffer-len",
        type=int,
        default=None,
        help="tokens below --rollout-max-response-len over which the penalty grows from 0 to its full size"
        " (default: no penalty)",
    )
    group.add_argument(
        "--overlong-penalty-factor", type=float, default=None, help="full size of the penalty (default: 1)"
    )
    return parser
