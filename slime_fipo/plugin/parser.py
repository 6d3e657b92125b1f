"""slime's argument parser with FIPO's flags: the module ``slime.utils.arguments`` is extended once it is imported, and
every mistake ends the program with one line before slime takes a GPU.

What the settings mean is in ``arguments.py``, what counts as one of our flags in ``spelling.py``. Whoever imports slime
under this is in ``slime_fipo/launch.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType

from ..errors import OneLineParser, UserError
from ..recipes.arguments import RECIPE_DESTS, add_recipe_arguments
from .arguments import (
    FIPO_DESTS,
    FIPO_FLAGS,
    OWN_FLAGS,
    actor_args,
    add_arguments,
    check_keys,
    check_stays_on,
    check_values,
    fipo_settings,
    translate,
    uses_fipo,
)
from .config_files import read_mapping
from .spelling import TURN_ON, misspelt_flags, names_fipo
from .values import dest_of

CUSTOM_CONFIG = "--custom-config-path"
_SIZES = ("--global-batch-size", "--n-samples-per-prompt", "--num-steps-per-rollout", "--rollout-batch-size")

logger = logging.getLogger(__name__)


def extend_slime_arguments(module: ModuleType) -> None:
    """Patch the module ``slime.utils.arguments``, once imported, so that its ``parse_args`` knows FIPO.

    With ``--loss-type fipo_loss`` the returned namespace is what :func:`translate` makes of it, and any mistake in it
    ends the program with one line and exit code 2, as argparse does. Otherwise the namespace is slime's own.

    Raises:
        RuntimeError: the module lacks the two functions that we rely on.
    """
    for name in ("parse_args", "get_slime_extra_args_provider"):
        if not callable(getattr(module, name, None)):
            raise RuntimeError(f"{module.__name__} has no {name}; slime v0.3.0, v0.3.1 and main 624b824a have")
    get_provider, parse_args = module.get_slime_extra_args_provider, module.parse_args

    @functools.wraps(get_provider)
    def get_extended_provider(*args, **kwargs):
        add_slime_arguments = get_provider(*args, **kwargs)

        def add_extended_arguments(parser):
            parser = add_slime_arguments(parser)
            with _one_line_errors():
                parser = add_recipe_arguments(add_arguments(parser))
                _check_command_line(sys.argv[1:], parser)
            return parser

        return add_extended_arguments

    @functools.wraps(parse_args)
    def parse_args_with_fipo(*args, **kwargs):
        with _one_line_errors():
            _check_before_slime(sys.argv[1:])
        namespace = parse_args(*args, **kwargs)
        with _one_line_errors():
            _finish(namespace)
        return namespace

    module.get_slime_extra_args_provider = get_extended_provider
    module.parse_args = parse_args_with_fipo


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """End the program as argparse does, without slime's 1,500 flags as its usage."""
    try:
        yield
    except (ValueError, ImportError) as error:
        print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
        sys.exit(2)


def _asks_for_help(arguments: Sequence[str]) -> bool:
    return "-h" in arguments or "--help" in arguments


def _check_command_line(arguments: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """slime's parser ignores flags that it does not know; a misspelt flag of ours must not pass for a default."""
    if not _asks_for_help(arguments):
        for _, message in misspelt_flags(arguments, parser, OWN_FLAGS):
            raise UserError(message)


def _check_before_slime(arguments: Sequence[str]) -> None:
    """Judge what slime's and Megatron's own checks would stumble over: batch sizes, and values in the YAML file."""
    if _asks_for_help(arguments):
        return
    parser = OneLineParser(add_help=False)
    for flag in (*_SIZES, CUSTOM_CONFIG, "--loss-type", "--custom-loss-function-path"):
        parser.add_argument(flag)
    given, _ = parser.parse_known_args(arguments)
    path = given.custom_config_path
    data = {} if path is None else read_mapping(CUSTOM_CONFIG, path)
    check_keys(data, f"{CUSTOM_CONFIG} {path}")
    check_values({name: data.get(name) for name in RECIPE_DESTS}, [f"{CUSTOM_CONFIG} {path}"])
    loss_type = data.get("loss_type", given.loss_type)
    if names_fipo(loss_type) and loss_type != "fipo_loss":
        raise UserError(f"--loss-type is {loss_type}; use {TURN_ON}")
    merged = argparse.Namespace(**{**vars(given), **data})
    check_stays_on(given.loss_type, merged, f"{CUSTOM_CONFIG} {path}")
    if uses_fipo(merged):
        sizes = {dest_of(flag): getattr(given, dest_of(flag)) for flag in _SIZES}
        check_values({name: _whole(text) for name, text in sizes.items()})
        check_values(data, [f"{CUSTOM_CONFIG} {path}"])


def _whole(text: str | None) -> int | str | None:
    try:
        return None if text is None else int(text)
    except ValueError:
        return text


def _finish(args: argparse.Namespace) -> None:
    for name in RECIPE_DESTS:  # flags that were not given leave no trace
        if getattr(args, name, None) is None:
            vars(args).pop(name, None)
    if args.loss_type == "fipo_loss":
        config = translate(args)
        from . import loss  # noqa: F401  a slime whose loss path we do not know is refused here, not on the GPUs

        logger.info("FIPO: %s", ", ".join(f"{name}={value}" for name, value in config.as_dict().items()))
        return
    _check_without_fipo_loss(args)
    for name in FIPO_DESTS:  # what --custom-config-path set for the route through custom_loss stays
        if getattr(args, name, None) is None:
            vars(args).pop(name, None)


def _check_without_fipo_loss(args: argparse.Namespace) -> None:
    """Settings of FIPO's must not stand idle, and the route through ``custom_loss`` is judged now, not on the GPUs."""
    given = [flag for flag in (word.partition("=")[0] for word in sys.argv[1:]) if flag in FIPO_FLAGS]
    if given:
        raise UserError(f"{given[0]} needs {TURN_ON}; it is {args.loss_type}")
    in_file = [name for name in FIPO_DESTS if getattr(args, name, None) is not None]
    if in_file and args.loss_type != "custom_loss":
        raise UserError(
            f"{in_file[0]} in {CUSTOM_CONFIG} {args.custom_config_path} needs {TURN_ON}; it is {args.loss_type}"
        )
    actor = actor_args(args)
    if uses_fipo(actor):
        fipo_settings(actor)
