"""A train command as slime would read it, without slime: the flags that the rules look at, with slime's defaults,
and the two files in which a command keeps flags, ``--custom-config-path`` and ``--eval-config``.

slime's real parser needs slime, Megatron and SGLang, and ignores flags that it does not know. This one needs none of
them, knows what it has to judge, and keeps what it does not know for a look at the spelling.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import OneLineParser, UserError
from ..plugin.arguments import OWN_FLAGS, actor_args, add_arguments, check_stays_on
from ..plugin.config_files import read_mapping
from ..plugin.spelling import key_correction, misspelt_flags
from ..recipes.arguments import add_recipe_arguments
from . import foreign_flags

# name: default, as in slime v0.3.0 to main 624b824a and the Megatron-LM that they pin
_INTEGERS = {
    "actor-num-gpus-per-node": 8,
    "actor-num-nodes": 1,
    "context-parallel-size": 1,
    "decoder-first-pipeline-num-layers": None,
    "decoder-last-pipeline-num-layers": None,
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
    "moe-ffn-hidden-size": None,
    "moe-shared-expert-intermediate-size": None,
    "n-samples-per-eval-prompt": 1,
    "n-samples-per-prompt": 1,
    "num-attention-heads": None,
    "num-epoch": None,
    "num-experts": None,
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
# All others are at least 1: no batch, group or length is empty. --num-rollout 0 evaluates alone.
_MINIMUM = {"lr-warmup-iters": 0, "num-rollout": 0, "rollout-num-gpus": 0}
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
    "apply-chat-template-kwargs": None,
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
    "eval-function-path": None,
    "eval-input-key": None,
    "eval-label-key": None,
    "eval-reward-key": None,
    "hf-checkpoint": None,
    "input-key": "input",
    "label-key": None,
    "load": None,
    "load-debug-rollout-data": None,
    "megatron-config-path": None,
    "moe-layer-freq": None,
    "pipeline-model-parallel-layout": None,
    "prompt-data": None,
    "ref-load": None,
    "reward-key": None,
    "rm-type": None,
    "rollout-data-postprocess-path": None,
    "rollout-function-path": None,
    "save": None,
}
_SWITCHES = (
    "add-qkv-bias",
    "allgather-cp",
    "apply-chat-template",
    "attention-output-gate",
    "calculate-per-token-loss",
    "colocate",
    "debug-rollout-only",
    "debug-train-only",
    "get-mismatch-metrics",
    "group-query-attention",
    "group-rm",
    "no-rope-fusion",
    "normalize-advantages",
    "override-opt-param-scheduler",
    "qk-layernorm",
    "rollout-external",
    "sequence-parallel",
    "swiglu",
    "untie-embeddings-and-output-weights",
    "use-checkpoint-opt-param-scheduler",
    "use-dynamic-batch-size",
    "use-kl-loss",
    "use-rollout-logprobs",
    "use-tis",
    "use-wandb",
)
_LISTS = ("eval-prompt-data", "rollout-external-engine-addrs", "spec")
# Flags of slime's that are not judged, and no misspelling of those above, but may be misspelt themselves.
_UNJUDGED = (
    "adam-beta1",
    "adam-beta2",
    "clip-grad",
    "eval-top-k",
    "lr-decay-style",
    "lr-warmup-fraction",
    "lr-warmup-init",
    "lr-warmup-samples",
    "no-load",
    "no-save",
    "rollout-top-k",
    "save-hf",
    "tis-clip",
)


@dataclass(frozen=True)
class EvalDataset:
    """One benchmark. None: what the command's flags say."""

    source: str  # the flag that names it, with its file
    name: str
    path: str
    input_key: str | None = None
    label_key: str | None = None
    max_response_len: int | None = None
    rm_type: str | None = None
    custom_rm_path: str | None = None


@dataclass(frozen=True)
class Command:
    """A train command. ``args`` has slime's names and, as in slime, the values of ``--custom-config-path`` over them;
    ``script`` is None when only arguments were given, and ``arguments`` are what stands behind it; ``misspelt`` and
    ``foreign`` are flags that slime ignores with what they were meant for; ``own_flags`` are those given that only we
    know, and ``misspelt_own`` says what is wrong with those meant for us; ``errors`` say what is wrong with the files
    that hold flags; ``slime_root`` is the checkout of slime that the command runs, where this machine has it."""

    args: argparse.Namespace
    launcher: bool
    script: str | None
    arguments: tuple[str, ...] = ()
    misspelt: tuple[tuple[str, str], ...] = ()
    misspelt_own: tuple[str, ...] = ()
    foreign: tuple[tuple[str, str], ...] = ()
    own_flags: tuple[str, ...] = ()
    eval_datasets: tuple[EvalDataset, ...] = ()
    errors: tuple[str, ...] = ()
    slime_root: Path | None = None


def _at_least(minimum: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"it is {value}; it must be at least {minimum}")
        return value

    integer.wanted = f"a whole number of at least {minimum}"
    return integer


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(add_help=False)
    for name, default in _INTEGERS.items():
        parser.add_argument(f"--{name}", type=_at_least(_MINIMUM.get(name, 1)), default=default)
    for names, kind in ((_FLOATS, float), (_STRINGS, str)):
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
    """Read a train command and the files that hold flags of it.

    Args:
        tokens: the arguments of slime's train script; the script and whatever stands before it (``python3 -m slime_fipo
            …/train.py``, or all of ``ray job submit … --``) may be there too.

    Raises:
        UserError: a value that the parser refuses.
    """
    tokens = list(tokens)
    first_flag = tokens.index("--") + 1 if "--" in tokens else 0
    scripts = [
        i
        for i, token in enumerate(tokens)
        if token.endswith(".py") and not any(t.startswith("--") for t in tokens[first_flag:i])
    ]
    script = scripts[-1] if scripts else None
    arguments = tokens if script is None else tokens[script + 1 :]
    parser = _parser()
    misspelt_own = dict(misspelt_flags(arguments, parser, OWN_FLAGS))
    try:
        args, unknown = parser.parse_known_args(arguments)
    except UserError:
        for message in misspelt_own.values():  # says more than the parser
            raise UserError(message) from None
        raise
    args.debug_train_only |= args.load_debug_rollout_data is not None
    errors: list[str] = []
    eval_datasets = tuple(_eval_datasets(args, errors))  # before the YAML's values, as in slime
    errors.extend(_merge_custom_config(args, parser))
    try:
        actor_args(args)
    except UserError as error:
        errors.append(str(error))

    given = [token.partition("=")[0] for token in arguments if token.startswith("--")]
    unknown = [token.partition("=")[0] for token in unknown if token.startswith("--")]
    foreign = {flag: replacement for flag in unknown if (replacement := foreign_flags.replacement(flag))}
    return Command(
        args,
        launcher=script is None or "slime_fipo" in tokens[:script],
        script=None if script is None else tokens[script],
        arguments=tuple(arguments),
        misspelt=tuple(_misspelt([f for f in unknown if f not in misspelt_own and f not in foreign], parser)),
        misspelt_own=tuple(misspelt_own.values()),
        foreign=tuple((flag, use) for flag, use in foreign.items() if flag not in misspelt_own),
        own_flags=tuple(flag for flag in given if flag in OWN_FLAGS),
        eval_datasets=eval_datasets,
        errors=tuple(errors),
    )


def _misspelt(unknown: list[str], parser: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    """Flags that slime will ignore, and what they may have been meant for."""
    judged = [option for action in parser._actions for option in action.option_strings]
    known = [*judged, *(f"--{name}" for name in _UNJUDGED)]
    for flag in unknown:
        dashed = flag.replace("_", "-")
        if flag in known:
            continue
        if dashed in known:
            yield flag, dashed
            continue
        longer = [name for name in judged if name.startswith(f"{flag}-")]
        close = difflib.get_close_matches(dashed, known, n=1, cutoff=0.94)
        if close or len(longer) == 1:
            yield flag, (longer if len(longer) == 1 else [*close, ""])[0]


# -- files that hold flags --


def _merge_custom_config(args: argparse.Namespace, parser: argparse.ArgumentParser) -> Iterator[str]:
    """Put the YAML's values over the flags', as slime does; yields what is wrong with them."""
    path = args.custom_config_path
    if path is None:
        return
    try:
        data = read_mapping("--custom-config-path", path)
    except UserError as error:
        yield str(error)
        return
    loss_type = args.loss_type
    actions = {action.dest: action for action in parser._actions}
    for name, value in data.items():
        action = actions.get(name)
        if action is None and (message := key_correction(name, OWN_FLAGS)):
            yield f"{message} in --custom-config-path {path}"
            continue
        if action is None:
            close = difflib.get_close_matches(name, actions, n=1, cutoff=0.94)
            if close:
                yield f"{name} in --custom-config-path {path} is nothing that slime reads; did you mean {close[0]}?"
        if action is not None and not name.startswith("fipo_") and (wanted := _unfit(value, action)):
            yield f"{name} in --custom-config-path {path} is {value!r}; it must be {wanted}"
        else:
            setattr(args, name, value)
    try:
        check_stays_on(loss_type, args, f"--custom-config-path {path}")
    except UserError as error:
        yield str(error)


def _unfit(value: Any, action: argparse.Action) -> str:
    """What a flag's value from a file must be, where it is not."""
    if value is None and action.default is None:
        return ""
    if action.nargs == 0:
        return "" if isinstance(value, bool) else "true or false"
    if action.nargs == "+":
        fits = isinstance(value, list) and all(isinstance(item, str) for item in value)
        return "" if fits else "a list of texts"
    if action.choices is not None:
        return "" if value in action.choices else f"one of {', '.join(action.choices)}"
    if action.type is str:
        return "" if isinstance(value, str) else "a text"
    wanted = getattr(action.type, "wanted", "a whole number")
    if action.type is float:
        wanted = "a number (YAML takes 1e-6 for a text: write 1.0e-6)"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return wanted
    try:
        action.type(str(value))
    except (argparse.ArgumentTypeError, ValueError):
        return wanted
    return ""


def _eval_datasets(args: argparse.Namespace, errors: list[str]) -> Iterator[EvalDataset]:
    """The benchmarks of ``--eval-config``, which wins, or of ``--eval-prompt-data``; appends to ``errors``."""
    names = list(args.eval_prompt_data or [])
    if args.eval_config is not None:
        yield from _eval_config_datasets(args.eval_config, errors)
    elif len(names) > 1 and len(names) % 2:
        errors.append("--eval-prompt-data wants pairs of a name and a path; one of them is missing its other half")
    elif len(names) == 1:
        yield EvalDataset("--eval-prompt-data", "aime", names[0])  # slime's name for a lone path
    else:
        for name, path in zip(names[::2], names[1::2], strict=True):
            yield EvalDataset("--eval-prompt-data", name, path)


def _eval_config_datasets(path: str, errors: list[str]) -> Iterator[EvalDataset]:
    source = f"--eval-config {path}"
    try:
        config = read_mapping("--eval-config", path)
    except UserError as error:
        errors.append(str(error))
        return
    config = config.get("eval", config)
    datasets = config.get("datasets") if isinstance(config, dict) else None
    defaults = (config.get("defaults") or {}) if isinstance(config, dict) else None
    if isinstance(datasets, dict):
        datasets = [
            {"name": name, **(entry or {})} if isinstance(entry or {}, dict) else entry
            for name, entry in datasets.items()
        ]
    if not isinstance(defaults, dict) or not datasets or not isinstance(datasets, list):
        errors.append(f"{source} names no benchmarks; list them under eval: datasets:, each with a name and a path")
        return
    kinds = {name: int if name == "max_response_len" else str for name in EvalDataset.__dataclass_fields__}
    for number, entry in enumerate(datasets, start=1):
        entry = {**defaults, **entry} if isinstance(entry, dict) else {}
        given = {name: value for name, value in entry.items() if name in kinds and value is not None}
        if not {"name", "path"} <= given.keys():
            errors.append(f"benchmark {number} of {source} has no name and path; add them")
            continue
        wrong = next((name for name, value in given.items() if type(value) is not kinds[name]), None)
        if wrong is not None:
            kind = "a whole number" if kinds[wrong] is int else "a text"
            errors.append(f"{wrong} of benchmark {number} in {source} is {given[wrong]!r}; it must be {kind}")
            continue
        yield EvalDataset(**{**given, "source": source})
