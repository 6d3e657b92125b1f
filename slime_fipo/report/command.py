"""The command: paths in, one page or one printed response out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from ..errors import UserError
from ..records.text import Decoders
from .inputs import DumpOptions, read_inputs
from .page import write_page
from .selection import select
from .terminal import find_response, parse_sample, print_response

REPORT_FILE = "report.html"
SAMPLES = 64


def write_report(
    paths: Sequence[Path],
    output: Path | None = None,
    samples: int = SAMPLES,
    rollouts: Sequence[int] = (),
    groups: Sequence[int] = (),
    tokenizer: Path | None = None,
    dumps: DumpOptions = DumpOptions(),  # noqa: B008 -- frozen
) -> tuple[Path, str]:
    """Read ``paths`` and write the page.

    Args:
        output: the file; None: ``report.html`` in the first path.
        samples: at most this many responses go in with their tokens.
        rollouts, groups: only responses of these; empty: of all.
        tokenizer: folder that decodes the token ids, instead of the one that the records name.
        dumps: how slime's dumps are read.

    Returns:
        The file, and the sentence that says which responses are in it.

    Raises:
        UserError: the paths or the choice cannot be used.
    """
    if samples < 0:
        raise UserError(f"--samples is {samples}; it must be at least 0")
    decoders = Decoders(tokenizer)
    runs = read_inputs(paths, dumps)
    chosen, sentence = select(runs, samples, rollouts, groups)
    if tokenizer is not None and not any(run.records for run in runs):
        raise UserError(f"--tokenizer {tokenizer} has no effect: these paths hold no token records; drop it")
    output = output if output is not None else paths[0] / REPORT_FILE
    try:
        write_page(output, runs, chosen, sentence, decoders)
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error.strerror or error}); choose another --output") from None
    return output, sentence


def print_tokens(
    paths: Sequence[Path],
    sample: str,
    tokenizer: Path | None = None,
    dumps: DumpOptions = DumpOptions(),  # noqa: B008 -- frozen
) -> None:
    """Print the response that ``sample`` names, coloured.

    Raises:
        UserError: as :func:`write_report`, or ``sample`` was not recorded.
    """
    decoders = Decoders(tokenizer)
    rollout, _ = parse_sample(sample)
    if rollout is not None:
        dumps = replace(dumps, rollouts=(rollout,))
    record = find_response(read_inputs(paths, dumps), sample)
    print_response(Console(highlight=False), record, decoders)
