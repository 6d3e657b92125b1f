"""``slime-fipo check``: what a train command will do other than its author thinks, said before any GPU is taken.

The rules live in ``flag_rules.py`` and ``file_rules.py``; ``effective_recipe`` is the table beside the paper's. What is
read: the command, the files that hold flags of it, the heads of its data files, and the checkpoints' ``config.json``.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..algorithm import FipoConfig
from ..errors import UserError
from ..plugin.arguments import actor_args, fipo_settings, translate
from .command import Command, parse_command
from .derived import LARGE, billions_of_parameters, global_batch_size, objective, steps_per_rollout
from .file_rules import FILE_RULES
from .finding import Finding, error
from .flag_rules import FLAG_RULES


def check_command(command: Command) -> tuple[list[Finding], FipoConfig | None]:
    """All findings, errors first, and FIPO's effective settings where the run has them and they are valid."""
    findings, config = [], None
    args = copy.copy(command.args)
    args.global_batch_size = global_batch_size(args)
    if objective(args) == "fipo_loss":
        try:
            config = translate(args) if args.loss_type == "fipo_loss" else fipo_settings(actor_args(args))
        except ValueError as problem:
            findings.append(error(str(problem)))
    for rule in (*FLAG_RULES, *FILE_RULES):
        findings.extend(rule(command, config))
    return sorted(dict.fromkeys(findings), key=lambda finding: finding.severity), config


# -- the effective recipe --

_PAPER_COMMON = {
    "half-life of Future-KL": "32 tokens",
    "dual clip": "10",
    "PPO clip": "0.2 / 0.28",
    "loss": "token-level mean",
    "learning-rate warm-up": "10 rollouts",  # Table 2's steps are verl's, one per rollout
    "shift measured from": "trainer's log-probs",
}
_PAPER = {
    ("fipo_loss", "7B"): {
        **_PAPER_COMMON,
        "prompts × samples per rollout": "512 × 32",
        "optimizer steps per rollout": "8",
        "samples per step": "2048",
        "tokens per step, at most": f"{2048 * 10240:,}",
        "prompt / response / overlong buffer": "2048 / 10240 / 2048",
        "influence weights": "[0.8, 1.2]",
        "safety threshold": "3",
    },
    ("fipo_loss", "32B"): {
        **_PAPER_COMMON,
        "prompts × samples per rollout": "512 × 16",
        "optimizer steps per rollout": "8",
        "samples per step": "1024",
        "tokens per step, at most": f"{1024 * 20480:,}",
        "prompt / response / overlong buffer": "2048 / 20480 / 4096",
        "influence weights": "[1, 1.2]",
        "safety threshold": "10",
    },
    ("policy_loss", "7B"): {
        **_PAPER_COMMON,
        "prompts × samples per rollout": "512 × 16",
        "optimizer steps per rollout": "16",
        "samples per step": "512",
        "tokens per step, at most": f"{512 * 8192:,}",
        "prompt / response / overlong buffer": "2048 / 8192 / 4096",
    },
    ("policy_loss", "32B"): {
        **_PAPER_COMMON,
        "prompts × samples per rollout": "512 × 16",
        "optimizer steps per rollout": "16",
        "samples per step": "512",
        "tokens per step, at most": f"{512 * 20480:,}",
        "prompt / response / overlong buffer": "2048 / 20480 / 4096",
    },
}


def effective_recipe(command: Command, config: FipoConfig | None) -> tuple[str, list[tuple[str, str, str]]]:
    """Heading of the paper's column, and rows of (setting, this command's, the paper's)."""
    args = command.args
    size = billions_of_parameters(args)
    paper_size = "32B" if size is not None and size > LARGE else "7B"
    batch, steps = global_batch_size(args), steps_per_rollout(args)
    rows = {
        "model": "?" if size is None else f"about {size:.1f}B",
        "prompts × samples per rollout": f"{args.rollout_batch_size or '?'} × {args.n_samples_per_prompt}",
        "optimizer steps per rollout": "?" if steps is None else str(steps),
        "samples per step": "?" if batch is None else str(batch),
        "tokens per step, at most": (
            f"{batch * args.rollout_max_response_len:,}" if batch and args.rollout_max_response_len else "?"
        ),
        "prompt / response / overlong buffer": " / ".join(
            "none" if n is None else str(n)
            for n in (args.rollout_max_prompt_len, args.rollout_max_response_len, args.overlong_buffer_len)
        ),
        "learning-rate warm-up": (
            f"{args.lr_warmup_iters / steps:g} rollouts ({args.lr_warmup_iters} steps)" if steps else "?"
        ),
        "PPO clip": f"{args.eps_clip:g} / {args.eps_clip if args.eps_clip_high is None else args.eps_clip_high:g}",
        "loss": "token-level mean" if args.calculate_per_token_loss else "mean over responses",
        "dual clip": "none" if args.eps_clip_c is None else f"{args.eps_clip_c:g} (slime main; v0.3.x ignores it)",
    }
    if config is not None:
        low, high = config.influence_bounds
        gamma = 2 ** (-1 / config.decay_rate)
        rows |= {
            "half-life of Future-KL": f"{config.decay_rate:g} tokens (γ = {gamma:.4f})",
            "influence weights": f"[{low:g}, {high:g}]",
            "safety threshold": "none" if config.safety_thresh is None else f"{config.safety_thresh:g}",
            "dual clip": "none" if config.dual_clip_c is None else f"{config.dual_clip_c:g}",
            "shift measured from": _shift_source(args),
        }
    kind = objective(args)
    paper = {"model": paper_size, **_PAPER.get((kind, paper_size), {})}
    name = {"fipo_loss": "FIPO", "policy_loss": "DAPO baseline"}.get(kind, kind)
    return f"paper, {paper_size} {name}", [(setting, value, paper.get(setting, "")) for setting, value in rows.items()]


def _shift_source(args: argparse.Namespace) -> str:
    if not args.use_rollout_logprobs:
        return "trainer's log-probs (recomputed)"
    if args.fipo_shift_from == "train":
        return "trainer's log-probs (ratio from SGLang's)"
    return "SGLang's log-probs (with engine mismatch)"


def main(tokens: Sequence[str], console: Console | None = None) -> int:
    """Print the effective recipe and the findings; 1 if there are errors, 2 if the command cannot be read."""
    console = console or Console(highlight=False)
    tokens = list(tokens)[1:] if list(tokens)[:1] == ["--"] else list(tokens)
    if not tokens:
        console.print("usage: slime-fipo check -- THE TRAIN COMMAND'S ARGUMENTS", markup=False, soft_wrap=True)
        return 2
    try:
        command = parse_command(tokens)
    except UserError as problem:
        console.print(f"error: {problem}", markup=False, soft_wrap=True)
        return 2
    findings, config = check_command(command)
    heading, rows = effective_recipe(command, config)
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("setting", "this run", heading):
        table.add_column(column)
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)
    for finding in findings:
        console.print(f"{finding.severity}: {finding.message}", markup=False, soft_wrap=True)
    errors = sum(f.severity == "error" for f in findings)
    console.print(f"{errors} errors, {len(findings) - errors} warnings")
    return int(errors > 0)
