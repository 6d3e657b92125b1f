"""FIPO's command-line flags: one argument group and its validation, for every host.

The names are those of slime PR #1801 where it has one. Every flag's default in the parser is None, so that
a flag that was given can be told from one that was not and wins over ``--fipo-preset``; the effective
settings are ``fipo_config_from_args(args)``.
"""

from __future__ import annotations

import argparse
from dataclasses import fields

from .config import DECAY_OVER, IMPLEMENTATIONS, PRESETS, FipoConfig

_DEFAULTS = {f.name: f.default for f in fields(FipoConfig)}


def _or_none(kind):
    def parse(text: str):
        return "none" if text.lower() == "none" else kind(text)

    parse.__name__ = f"{kind.__name__} or 'none'"  # argparse prints it: «invalid float or 'none' value»
    return parse


# flag -> (field of FipoConfig, options of add_argument); the help text gets the field's default appended.
_FIELD_FLAGS = {
    "--fipo-decay-rate": (
        "decay_rate",
        {"type": float, "help": "half-life of Future-KL in tokens (tau); gamma = 2^(-1/tau)"},
    ),
    "--fipo-chunk-size": (
        "chunk_size",
        {"type": int, "help": "columns per matrix product of --fipo-impl chunked; does not change the result"},
    ),
    "--fipo-clip-ratio-low": (
        "clip_ratio_low",
        {"type": float, "help": "influence weights are at least 1 - this, in [0, 1)"},
    ),
    "--fipo-clip-ratio-high": ("clip_ratio_high", {"type": float, "help": "influence weights are at most 1 + this"}),
    "--fipo-clip-high-only": (
        "clip_high_only",
        {"action": argparse.BooleanOptionalAction, "help": "influence weights are at least 1.0"},
    ),
    "--fipo-unclipped": (
        "clip_influence",
        {"action": argparse.BooleanOptionalAction, "help": "the authors' unclipped mode: weights in [0, 10]"},
    ),
    "--fipo-safety-thresh": (
        "safety_thresh",
        {
            "type": _or_none(float),
            "help": "ratio above which a token with a negative advantage gets a weight in [0.8, 1]; 'none': no cap",
        },
    ),
    "--fipo-dual-clip-c": (
        "dual_clip_c",
        {
            "type": _or_none(float),
            "help": "dual-clip constant c: bounds the loss of negative advantages, and tokens with a ratio above it"
            " do not take part in Future-KL; 'none' turns both and the sequence filter off",
        },
    ),
    "--fipo-max-dual-clipped-tokens": (
        "max_dual_clipped_tokens",
        {
            "type": _or_none(int),
            "help": "a response with more dual-clipped tokens than this is dropped; 'none': never",
        },
    ),
    "--fipo-decay-over": (
        "decay_over",
        {
            "choices": DECAY_OVER,
            "help": "what the decay counts: all positions, or trained tokens only (tool results cost no distance)",
        },
    ),
    "--fipo-impl": ("impl", {"choices": IMPLEMENTATIONS, "help": "how Future-KL is computed"}),
}


def _dest(flag: str) -> str:
    return flag[2:].replace("-", "_")


def add_fipo_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the FIPO argument group to ``parser`` and return the parser."""
    group = parser.add_argument_group("FIPO", "Future-KL Influenced Policy Optimization (arXiv:2603.19835)")
    group.add_argument(
        "--fipo-preset",
        choices=tuple(PRESETS),
        default=None,
        help="the paper's settings for that model size; flags given with it win",
    )
    for flag, (field, options) in _FIELD_FLAGS.items():
        default = not _DEFAULTS[field] if flag == "--fipo-unclipped" else _DEFAULTS[field]
        options = dict(options, help=f"{options['help']} (default: {default})".replace("%", "%%"))
        group.add_argument(flag, dest=_dest(flag), default=None, **options)
    group.add_argument(
        "--fipo-clip-ratio",
        type=float,
        default=None,
        help="shorthand for --fipo-clip-ratio-low X --fipo-clip-ratio-high X",
    )
    return parser


def fipo_dests() -> tuple[str, ...]:
    """Names under which the group's values stand in a parsed namespace."""
    return ("fipo_preset", *map(_dest, _FIELD_FLAGS), "fipo_clip_ratio")


def fipo_config_from_args(args: argparse.Namespace) -> FipoConfig:
    """Turn a parsed namespace into the effective :class:`FipoConfig`.

    Precedence: a flag that was given (not None), then ``--fipo-preset``, then the defaults. Missing attributes
    count as not given, so a namespace that a host filled from a file works too; there, None and the text
    ``none`` mean «not given» and «off».

    Also reads the host's ``eps_clip_high`` (or ``eps_clip``) where present, since c must exceed the upper PPO clip.

    Raises:
        ValueError: names the flag, what it got, and what to do instead.
    """
    given = {}
    for flag, (field, _) in _FIELD_FLAGS.items():
        value = getattr(args, _dest(flag), None)
        if value is None:
            continue
        if isinstance(value, str) and value.lower() == "none":
            value = None
        given[field] = (not value) if flag == "--fipo-unclipped" else value

    typed = set(given)  # a preset's settings give way; only what the user gave can contradict
    both = getattr(args, "fipo_clip_ratio", None)
    if both is not None:
        for side in ("clip_ratio_low", "clip_ratio_high"):
            if side in given:
                raise ValueError(
                    f"--fipo-clip-ratio sets both sides, but {_flag_of(side)} was given too; drop one of them"
                )
        if both == 0:
            raise ValueError(
                "--fipo-clip-ratio 0 means unclipped weights in the authors' code and weights of 1 elsewhere; say"
                " --fipo-unclipped, or --fipo-clip-ratio-low 0 --fipo-clip-ratio-high 0 for weights of 1"
            )
        given["clip_ratio_low"] = given["clip_ratio_high"] = both
    elif "clip_ratio_low" in given:
        given.setdefault("clip_high_only", False)  # a lower bound that was given wins over a preset's high-only

    preset = getattr(args, "fipo_preset", None)
    try:
        config = FipoConfig.preset(preset, **given) if preset is not None else FipoConfig(**given)
    except ValueError as error:
        raise ValueError(_name_flags(str(error), both is not None)) from None

    def refuse_idle(why: str, *idle: str) -> None:
        for field in idle:
            if field in typed and given[field] is not None and given[field] is not False:
                raise ValueError(f"{why}, so {_flag_of(field)} would do nothing; drop one of the two")

    if not config.clip_influence:
        why = "--fipo-unclipped bounds the weights to [0, 10]"
        if both is not None:
            raise ValueError(f"{why}, so --fipo-clip-ratio would do nothing; drop one of the two")
        refuse_idle(why, "clip_ratio_low", "clip_ratio_high", "clip_high_only")
    if config.clip_high_only:
        refuse_idle("--fipo-clip-high-only bounds the weights to at least 1", "clip_ratio_low")
    if config.dual_clip_c is None:
        refuse_idle("--fipo-dual-clip-c none turns the sequence filter off", "max_dual_clipped_tokens")
    eps_clip_high = getattr(args, "eps_clip_high", None)
    if eps_clip_high is None:
        eps_clip_high = getattr(args, "eps_clip", None)
    c = config.dual_clip_c
    if c is not None and eps_clip_high is not None and c <= 1 + eps_clip_high:
        raise ValueError(
            f"--fipo-dual-clip-c is {c:g}; it must be above 1 + --eps-clip-high = {1 + eps_clip_high:g},"
            " or 'none' to turn the dual clip off"
        )
    return config


def _flag_of(field: str) -> str:
    return next(flag for flag, (name, _) in _FIELD_FLAGS.items() if name == field)


def _name_flags(message: str, shorthand: bool) -> str:
    """Replace the field that a FipoConfig error starts with by the flag that set it."""
    field = message.split(" ", 1)[0]
    if field == "preset":
        return "--fipo-preset" + message[len("preset") :]
    flag = "--fipo-clip-ratio" if shorthand and field.startswith("clip_ratio") else _flag_of(field)
    return f"{flag}{message[len(field) :]}".replace("None", "'none'")
