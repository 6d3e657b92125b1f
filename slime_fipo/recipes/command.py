"""A train command as slime would read it, without slime: the flags that ``check.py`` looks at, with slime's defaults.

slime's real parser needs slime, Megatron and SGLang, and ignores flags that it does not know. This one needs none of
them, knows what it has to judge, and keeps what it does not know for a look at the spelling.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from ..plugin.arguments import add_arguments
from ..plugin.recipe_arguments import add_recipe_arguments

# name: default, as in slime v0.3.0 to main 624b824a and the Megatron-LM that they pin
_INTEGERS = {
    "actor-num-gpus-per-node": 8,
    "actor-num-nodes": 1,
    "context-parallel-size": 1,
    "eval-interval": None,
    "eval-max-prompt-len": None,
    "eval-max-response-len": None,
    "ffn-hidden-size": None,
    "global-batch-size": None,
    "hidden-size": None,
    "kv-channels": None,
    "lr-decay-iters": None,
    "lr-warmup-iters": 0,
    "max-position-embeddings": None,
    "max-tokens-per-gpu": None,
    "micro-batch-size": 1,
    "n-samples-per-eval-prompt": 1,
    "n-samples-per-prompt": 1,
    "num-attention-heads": None,
    "num-epoch": None,
    "num-gpus-per-node": 8,
    "num-layers": None,
    "num-query-groups": None,
    "num-rollout": None,
    "num-steps-per-rollout": None,
    "over-sampling-batch-size": None,
    "pipeline-model-parallel-size": 1,
    "rollout-batch-size": None,
    "rollout-max-context-len": None,
    "rollout-max-prompt-len": None,
    "rollout-max-response-len": None,
    "rollout-num-gpus": None,
    "rollout-num-gpus-per-engine": 1,
    "save-interval": None,
    "tensor-model-parallel-size": 1,
    "vocab-size": None,
}
_FLOATS = {
    "entropy-coef": 0.0,
    "eps-clip": 0.2,
    "eps-clip-c": None,
    "eps-clip-high": None,
    "eval-temperature": None,
    "eval-top-p": None,
    "kl-coef": 0.0,
    "kl-loss-coef": 0.0,
    "lr": 1e-6,
    "norm-epsilon": 1e-5,
    "rollout-temperature": 1.0,
    "rollout-top-p": 1.0,
    "rotary-base": 10000.0,
    "weight-decay": 0.01,
}
_STRINGS = {
    "advantage-estimator": "grpo",
    "custom-config-path": None,
    "custom-eval-rollout-log-function-path": None,
    "custom-loss-function-path": None,
    "custom-megatron-before-train-step-hook-path": None,
    "custom-reward-post-process-path": None,
    "custom-rm-path": None,
    "custom-rollout-log-function-path": None,
    "custom-tis-function-path": None,
    "dynamic-sampling-filter-path": None,
    "eval-config": None,
    "eval-input-key": None,
    "eval-label-key": None,
    "eval-reward-key": None,
    "hf-checkpoint": None,
    "input-key": "input",
    "label-key": None,
    "load": None,
    "prompt-data": None,
    "ref-load": None,
    "reward-key": None,
    "rm-type": None,
    "rollout-function-path": None,
    "save": None,
}
_SWITCHES = (
    "allgather-cp",
    "attention-output-gate",
    "calculate-per-token-loss",
    "colocate",
    "debug-rollout-only",
    "debug-train-only",
    "get-mismatch-metrics",
    "group-query-attention",
    "no-rope-fusion",
    "qk-layernorm",
    "sequence-parallel",
    "swiglu",
    "untie-embeddings-and-output-weights",
    "use-dynamic-batch-size",
    "use-kl-loss",
    "use-rollout-logprobs",
    "use-tis",
)
_LISTS = ("eval-prompt-data", "spec")
# Flags of slime's that are one letter away from others above; not judged, and no misspelling.
_LOOKALIKES = ("eval-top-k", "rollout-top-k", "adam-beta1", "adam-beta2", "no-load", "no-save", "tis-clip")


class CommandError(ValueError):
    """The command cannot be read; the message is argparse's one line."""


@dataclass(frozen=True)
class Command:
    """A train command. ``args`` has slime's names; ``script`` is None when only arguments were given."""

    args: argparse.Namespace
    launcher: bool
    script: str | None
    misspelt: tuple[tuple[str, str], ...]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise CommandError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(add_help=False, allow_abbrev=False)
    for names, kind in ((_INTEGERS, int), (_FLOATS, float), (_STRINGS, str)):
        for name, default in names.items():
            parser.add_argument(f"--{name}", type=kind, default=default)
    for name in _SWITCHES:
        parser.add_argument(f"--{name}", action="store_true")
    for name in _LISTS:
        parser.add_argument(f"--{name}", nargs="+", default=None)
    parser.add_argument(
        "--disable-compute-advantages-and-returns", dest="compute_advantages_and_returns", action="store_false"
    )
    parser.add_argument("--loss-type", default="policy_loss", choices=["policy_loss", "sft_loss", "custom_loss"])
    return add_recipe_arguments(add_arguments(parser))


def parse_command(tokens: Sequence[str]) -> Command:
    """Read a train command.

    Args:
        tokens: the arguments of slime's train script; the script and whatever stands before it (``python3 -m slime_fipo
            …/train.py``, or all of ``ray job submit … --``) may be there too.

    Raises:
        CommandError: a value that the parser refuses.
    """
    tokens = list(tokens)
    first_flag = tokens.index("--") + 1 if "--" in tokens else 0
    scripts = [
        i
        for i, token in enumerate(tokens)
        if token.endswith(".py") and not any(t.startswith("--") for t in tokens[first_flag:i])
    ]
    script = scripts[-1] if scripts else None
    launcher = script is None or "slime_fipo" in tokens[:script]
    parser = _parser()
    args, unknown = parser.parse_known_args(tokens if script is None else tokens[script + 1 :])

    known = [option for action in parser._actions for option in action.option_strings]
    known_or_alike = [*known, *(f"--{name}" for name in _LOOKALIKES)]
    misspelt = []
    for token in unknown:
        flag = token.partition("=")[0]
        if not flag.startswith("--") or flag in known_or_alike:
            continue
        ours = flag.startswith(("--fipo-", "--no-fipo-", "--overlong-"))
        close = difflib.get_close_matches(flag, known, n=1, cutoff=0.6 if ours else 0.94)
        if ours or close:
            misspelt.append((flag, close[0] if close else ""))
    return Command(args, launcher, None if script is None else tokens[script], tuple(misspelt))
