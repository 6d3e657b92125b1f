"""``slime-fipo check``: what a train command will do other than its author thinks, said before any GPU is taken.

The rules live in ``flag_rules``, ``reward_rules`` and ``file_rules``, slime's own parser is asked by ``slime_parser``;
``effective_recipe`` is the table beside the paper's. Nothing is judged here.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path

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
from .reward_rules import REWARD_RULES
from .slime_parser import Verdict, ask, locate


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
    for rule in (*FLAG_RULES, *REWARD_RULES, *FILE_RULES):
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


def main(
    tokens: Sequence[str],
    console: Console | None = None,
    *,
    ask_slime: bool = False,
    slime_root: Path | None = None,
    megatron_root: Path | None = None,
) -> int:
    """Print the effective recipe and the findings.

    Args:
        tokens: the train command, or its arguments alone.
        ask_slime: let slime's parser judge too, where it can be run; ``slime_root`` and ``megatron_root`` are checkouts
            to take in place of those that are found.

    Returns:
        The exit code: 0 without errors, 1 with some, 2 if the command cannot be read.
    """
    console = console or Console(highlight=False)

    def say(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    tokens = list(tokens)[1:] if list(tokens)[:1] == ["--"] else list(tokens)
    if not tokens:
        say("usage: slime-fipo check -- THE TRAIN COMMAND'S ARGUMENTS (slime-fipo check --help says more)")
        return 2
    try:
        command = parse_command(tokens)
        installation = locate(command, slime_root, megatron_root)
    except UserError as problem:
        say(f"error: {problem}")
        return 2
    command = dataclasses.replace(command, slime_root=installation.slime)
    findings, config = check_command(command)
    verdict = ask(command, installation) if ask_slime else Verdict("slime's parser was not asked", judged=False)
    findings = merged(findings, verdict)
    heading, rows = effective_recipe(command, config)
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("setting", "this run", heading):
        table.add_column(column)
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)
    for finding in findings:
        say(f"{finding.severity}: {finding.message}")
    say(verdict.summary)
    errors = sum(f.severity == "error" for f in findings)
    console.print(f"{errors} errors, {len(findings) - errors} warnings")
    return int(errors > 0)


def merged(findings: Sequence[Finding], verdict: Verdict) -> list[Finding]:
    """Ours and slime's, errors first; what slime's parser says in our words (FIPO's part of it) is not said twice."""
    ours = [finding.message for finding in findings]
    new = [finding for finding in verdict.findings if not any(message in finding.message for message in ours)]
    return sorted([*findings, *new], key=lambda finding: finding.severity)
