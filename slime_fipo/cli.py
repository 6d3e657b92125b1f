"""The ``slime-fipo`` command: one subcommand per part of the package, each imported only when it is called.

Errors of the user's making end with one line on stderr and exit code 2.
"""

from __future__ import annotations

import importlib
import sys

import typer
from typer.core import TyperGroup

from .errors import UserError
from .plugin.patch import app as patch_app  # light: neither torch nor slime


class _OneLineErrors(TyperGroup):
    """Every subcommand's :class:`UserError` ends here, as one line and exit code 2."""

    def invoke(self, context):
        try:
            return super().invoke(context)
        except UserError as error:
            _fail(f"slime-fipo {context.invoked_subcommand}: {error}")


app = typer.Typer(
    name="slime-fipo",
    cls=_OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="FIPO (Future-KL Influenced Policy Optimization) for slime.",
)

# The flags of these commands are argparse's, because FIPO's argument group serves slime's parser too.
_PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


app.add_typer(patch_app, name="patch")


@app.callback()
def _root() -> None:
    pass


@app.command(context_settings=_PASS_THROUGH, add_help_option=False)
def local(context: typer.Context) -> None:
    """Train a small model with FIPO on this machine, without a GPU (--help: every flag)."""
    _run_embedded("local", "engine", context.args)


@app.command(context_settings=_PASS_THROUGH, add_help_option=False)
def compare(context: typer.Context) -> None:
    """DAPO against FIPO on this machine, several seeds with equal budgets (--help: every flag)."""
    _run_embedded("compare", "compare", context.args)


@app.command(context_settings=_PASS_THROUGH, add_help_option=False)
def check(context: typer.Context) -> None:
    """Say what a train command would do other than expected: slime-fipo check -- THE TRAIN COMMAND'S ARGUMENTS."""
    from .check.preflight import main

    raise typer.Exit(main(context.args))


def _run_embedded(command: str, module: str, argv: list[str]) -> None:
    try:
        main = importlib.import_module(f".local.{module}", __package__).main
    except ModuleNotFoundError as error:
        _fail(f"slime-fipo {command} needs the package {error.name}: pip install '/path/to/slime-fipo[local]'")
    try:
        main(argv)
    except OSError as error:
        _fail(f"slime-fipo {command}: {error}; what is on disk is whole, and the same command continues")


def _fail(message: str) -> None:
    print(message, file=sys.stderr)
    raise typer.Exit(2)


if __name__ == "__main__":
    app()
