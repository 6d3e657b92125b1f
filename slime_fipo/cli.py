"""The ``slime-fipo`` command: one subcommand per part of the package, each imported only when it is called.

Errors of the user's making end with one line on stderr and exit code 2.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Annotated

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


_CHECK_HELP = "\n\n".join(  # one line a paragraph, which the terminal's width breaks
    (
        "Say what a train command would do other than expected, before a GPU is taken.",
        "Reads the command (all of it, from ray job submit on, or its arguments alone), the YAML files that it names,"
        " its data files, and the config.json and chat template of its checkpoints. Prints its settings beside the"
        " paper's, then every error and warning with the flag and the fix.",
        "Where slime, Megatron-LM and SGLang can be imported, slime's own parser is asked as well, in a process of its"
        " own and without a GPU: 10 to 20 seconds, 180 at most. Nothing is started, trained or written.",
        "Exit codes: 0 no errors (there may be warnings), 1 errors, 2 the command cannot be read.",
        "Example: slime-fipo check -- python3 -m slime_fipo /root/slime/train.py --loss-type fipo_loss …",
        'A launch script: eval "slime-fipo check -- $(DRY_RUN=1 bash examples/fipo/run-qwen3-4B.sh)"',
    )
)

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
    """A paired study on this machine: DAPO against FIPO and its placebos, seed by seed (--help: every flag)."""
    _run_embedded("compare", "study.command", context.args)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False},
    options_metavar="[OPTIONS] -- TRAIN COMMAND",
    help=_CHECK_HELP,
)
def check(
    context: typer.Context,
    slime_root: Annotated[
        Path | None,
        typer.Option(
            envvar="SLIME_ROOT",
            help="Checkout of slime. By default the folder of the command's train script, or what Python imports.",
        ),
    ] = None,
    megatron_root: Annotated[
        Path | None,
        typer.Option(envvar="MEGATRON_ROOT", help="Checkout of Megatron-LM. By default what Python imports."),
    ] = None,
    slime_parser: Annotated[
        bool,
        typer.Option("--slime-parser/--no-slime-parser", help="Let slime's own argument parser judge the command too."),
    ] = True,
) -> None:
    from .check.preflight import main

    raise typer.Exit(main(context.args, ask_slime=slime_parser, slime_root=slime_root, megatron_root=megatron_root))


_REHEARSE_HELP = "\n\n".join(
    (
        "Run a train command end to end on this machine, without a GPU: its data, prompts, reward, filters, hooks,"
        " evaluation and flags through the real slime, Megatron-LM, SGLang and Ray.",
        "The model becomes a small one of the same family with random weights; batches, lengths and ranks shrink; a"
        " table says what was changed to what. Three rollouts, a checkpoint, and a run that continues from it.",
        "It ends with a verdict, one line for each thing seen. Its Ray, ports and files are its own; --save and every"
        " other folder of the command stay untouched.",
        "Exit codes: 0 nothing wrong, 1 something is, 2 the command cannot be read or something is missing here.",
        "Example: slime-fipo rehearse -- python3 -m slime_fipo /root/slime/train.py --loss-type fipo_loss …",
        "A launch script: REHEARSE=1 bash examples/fipo/run-qwen3-4B.sh",
    )
)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False},
    options_metavar="[OPTIONS] -- TRAIN COMMAND",
    help=_REHEARSE_HELP,
)
def rehearse(
    context: typer.Context,
    slime_root: Annotated[
        Path | None,
        typer.Option(
            envvar="SLIME_ROOT",
            help="Checkout of slime. By default the folder of the command's train script, or what Python imports.",
        ),
    ] = None,
    megatron_root: Annotated[
        Path | None,
        typer.Option(envvar="MEGATRON_ROOT", help="Checkout of Megatron-LM. By default what Python imports."),
    ] = None,
    time_limit: Annotated[float, typer.Option(help="seconds for each of the two runs")] = 1800.0,
) -> None:
    from .rehearsal.command import main

    raise typer.Exit(main(context.args, slime_root=slime_root, megatron_root=megatron_root, time_limit_s=time_limit))


@app.command()
def report(
    context: typer.Context,
    paths: Annotated[
        list[Path], typer.Argument(help="run directories, slime-fipo compare, token records, slime's --dump-details")
    ],
    output: Annotated[Path | None, typer.Option(help="the page; default: report.html in the first PATH")] = None,
    samples: Annotated[int, typer.Option(help="at most this many responses go in with all their tokens")] = 64,
    rollout: Annotated[list[int] | None, typer.Option(help="only this rollout; may be repeated")] = None,
    group: Annotated[list[int] | None, typer.Option(help="only this group of a rollout; may be repeated")] = None,
    tokens: Annotated[
        str | None, typer.Option(metavar="SAMPLE", help="print one response instead: POSITION or ROLLOUT:POSITION")
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="folder of the tokenizer, if the records name none")] = None,
    use_rollout_logprobs: Annotated[
        bool | None, typer.Option(help="for slime's dumps: whether the run had this flag", show_default="unknown")
    ] = None,
    fipo_preset: Annotated[str | None, typer.Option(help="for slime's dumps: the run's settings, 7b or 32b")] = None,
) -> None:
    """See what FIPO did: one HTML page that needs neither a server nor a network, from runs and token records."""
    try:
        from .algorithm import FipoConfig
        from .report.command import print_tokens, write_report
        from .report.inputs import DumpOptions
    except ModuleNotFoundError as error:
        _fail(f"slime-fipo report needs the package {error.name}: pip install '/path/to/slime-fipo[report]'")
    try:
        try:
            config = None if fipo_preset is None else FipoConfig.preset(fipo_preset)
        except ValueError as error:
            raise UserError(f"--fipo-{error}") from None
        dumps = DumpOptions(config, use_rollout_logprobs, tuple(rollout or ()))
        if tokens is not None:
            for name in ("output", "samples", "rollout", "group"):
                if context.get_parameter_source(name).name != "DEFAULT":
                    raise UserError(f"--{name} has no effect with --tokens ROLLOUT:POSITION; drop one of them")
            print_tokens(paths, tokens, tokenizer, dumps)
        else:
            path, sentence = write_report(paths, output, samples, rollout or (), group or (), tokenizer, dumps)
            print(sentence)
            print(path)
    except UserError as error:
        _fail(f"slime-fipo report: {error}")


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
