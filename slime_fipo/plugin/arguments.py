"""FIPO's settings as slime sees them: the flags in slime's parser, what they require of slime's own flags, and the
namespace that makes an unmodified slime in a Ray actor load our loss.

The objective's own flags and bounds live in ``slime_fipo.algorithm``; the loss itself in ``loss.py``. Nothing here
imports slime, so that a launcher can import it first.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from types import ModuleType

from ..algorithm import FipoConfig, add_fipo_arguments, fipo_config_from_args, fipo_dests
from ..recipes.arguments import RECIPE_DESTS, add_recipe_arguments

LOSS_PATH = "slime_fipo.plugin.loss.fipo_loss_function"
HOOK_PATH = "slime_fipo.plugin.loss.before_train_step_hook"
MISMATCH_METRICS_PATH = "slime_fipo.plugin.loss.mismatch_metrics_function"

SLIME_DESTS = ("fipo_shift_from", "fipo_allow_single_step", "fipo_log_detail")
_DESTS = (*fipo_dests(), *SLIME_DESTS)
# Written into the namespace by us, never by a user.
_INTERNAL = ("fipo_step_id", "fipo_chained_hook_path")
_SHIFT_FROM = ("ratio", "train")

# All that ``fipo_settings`` reads, so that a settings object can be reused while none of it changes.
_READ = (
    *_DESTS,
    "advantage_estimator",
    "compute_advantages_and_returns",
    "custom_tis_function_path",
    "eps_clip",
    "eps_clip_c",
    "eps_clip_high",
    "get_mismatch_metrics",
    "global_batch_size",
    "keep_old_actor",
    "n_samples_per_prompt",
    "rollout_batch_size",
    "use_rollout_logprobs",
)

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the FIPO group, with the flags that only slime has a use for, and ``fipo_loss`` to ``--loss-type``.

    Raises:
        RuntimeError: the parser has no ``--loss-type`` with choices, so this is no slime that we know.
        ValueError: FIPO is built into this slime already.
    """
    loss_type = next((a for a in parser._actions if "--loss-type" in a.option_strings), None)
    if loss_type is None or loss_type.choices is None:
        raise RuntimeError(
            "slime's parser has no --loss-type with choices; slime v0.3.0, v0.3.1 and main 624b824a have"
        )
    if "fipo_loss" in loss_type.choices:
        raise ValueError("this slime has fipo_loss built in; leave out '-m slime_fipo', or slime-fipo patch revert")
    loss_type.choices = [*loss_type.choices, "fipo_loss"]
    loss_type.help = f"{loss_type.help or ''} fipo_loss is policy_loss with FIPO's weights; see the FIPO group."
    return _add_fipo_group(parser)


def _add_fipo_group(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    add_fipo_arguments(parser)
    group = next(g for g in parser._action_groups if g.title == "FIPO")
    group.add_argument(
        "--fipo-shift-from",
        choices=_SHIFT_FROM,
        default=None,
        help="old log-probs that Future-KL measures the shift from: those of slime's ratio, or Megatron's recomputed"
        " ones while the ratio stays on SGLang's with --use-rollout-logprobs (default: ratio)",
    )
    group.add_argument(
        "--fipo-allow-single-step",
        action="store_true",
        default=None,
        help="allow one optimizer step per rollout: there is a shift then only where the old log-probs are another"
        " policy's, with --keep-old-actor or with stale asynchronous rollouts and --use-rollout-logprobs",
    )
    group.add_argument(
        "--fipo-log-detail",
        action="store_true",
        default=None,
        help="log safety cap, exclusions, non-finite shifts and the ratio bands of negative advantages too",
    )
    return parser


def fipo_settings(args: argparse.Namespace) -> FipoConfig:
    """The effective settings of a parsed slime namespace, with everything checked that FIPO needs of slime's flags.

    Costs microseconds when called again with the same values, so that the loss can check on every micro-batch.

    Raises:
        ValueError: names the flags and what to do instead.
    """
    _check_names(args)
    values = tuple(getattr(args, name, None) for name in _READ)
    try:
        return _checked(values)
    except TypeError:  # a YAML file put a list or a mapping where a flag's value belongs
        name = next(n for n, v in zip(_READ, values, strict=True) if isinstance(v, (list, dict, set)))
        raise ValueError(f"{_flag(name)} is {getattr(args, name)!r}; it must be a single value") from None


@functools.lru_cache(maxsize=16)
def _checked(values: tuple) -> FipoConfig:
    args = argparse.Namespace(**dict(zip(_READ, values, strict=True)))
    config = fipo_config_from_args(args)

    c = config.dual_clip_c
    if args.eps_clip_c is not None and args.eps_clip_c != c:
        raise ValueError(
            f"--eps-clip-c {args.eps_clip_c} contradicts --fipo-dual-clip-c {'none' if c is None else f'{c:g}'}, which"
            " also sets the dual clip; drop --eps-clip-c"
        )
    if args.advantage_estimator in ("gspo", "cispo"):
        raise ValueError(
            f"--advantage-estimator {args.advantage_estimator} has no per-token PPO ratio for FIPO to weight; use grpo,"
            " reinforce_plus_plus, reinforce_plus_plus_baseline or ppo, or drop --loss-type fipo_loss"
        )
    if args.compute_advantages_and_returns is False:
        raise ValueError("--disable-compute-advantages-and-returns leaves FIPO no advantages to weight; drop it")

    for name in ("fipo_allow_single_step", "fipo_log_detail"):
        if getattr(args, name) not in (None, True, False):
            raise ValueError(f"{_flag(name)} is {getattr(args, name)!r}; it must be true or false")
    if args.fipo_shift_from not in (None, *_SHIFT_FROM):
        raise ValueError(f"--fipo-shift-from is {args.fipo_shift_from!r}; it must be one of {', '.join(_SHIFT_FROM)}")
    if shift_is_apart(args) and not args.get_mismatch_metrics:
        raise ValueError(
            "--fipo-shift-from train beside --use-rollout-logprobs needs Megatron's log-probs, which slime recomputes"
            f" with --get-mismatch-metrics --custom-tis-function-path {MISMATCH_METRICS_PATH}; add both"
            " (python3 -m slime_fipo with --loss-type fipo_loss does)"
        )
    _check_steps_per_rollout(args)
    return config


def shift_is_apart(args: argparse.Namespace) -> bool:
    """Whether Future-KL takes Megatron's old log-probs while slime's ratio takes SGLang's."""
    return getattr(args, "fipo_shift_from", None) == "train" and bool(args.use_rollout_logprobs)


def _check_steps_per_rollout(args: argparse.Namespace) -> None:
    sizes = (args.rollout_batch_size, args.n_samples_per_prompt, args.global_batch_size)
    if None in sizes:
        return
    prompts, samples_per_prompt, batch = sizes
    samples = prompts * samples_per_prompt
    if samples // batch > 1:
        return
    steps = next((n for n in (8, 4, 2, *range(3, samples + 1)) if samples % n == 0), 1)
    fix = (
        f"one optimizer step per rollout (--global-batch-size {batch} of {samples} samples) leaves Future-KL at"
        f" zero and FIPO without effect; use --global-batch-size {samples // steps} ({steps} steps) or"
        f" --num-steps-per-rollout {steps}"
    )
    if not args.fipo_allow_single_step:
        raise ValueError(
            f"{fix}, or --fipo-allow-single-step where the old log-probs are another policy's: with --keep-old-actor,"
            " or with stale asynchronous rollouts and --use-rollout-logprobs"
        )
    if not args.keep_old_actor and (not args.use_rollout_logprobs or shift_is_apart(args)):
        raise ValueError(
            f"{fix}; --fipo-allow-single-step helps only where the old log-probs are another policy's: with"
            " --keep-old-actor, or with stale asynchronous rollouts, --use-rollout-logprobs and without"
            " --fipo-shift-from train"
        )


def _flag(dest: str) -> str:
    return "--" + dest.replace("_", "-")


def _check_names(args: argparse.Namespace) -> None:
    """Refuse ``fipo_*`` attributes that are no setting of ours, such as a misspelt key of ``--custom-config-path``."""
    global _names_checked
    if _names_checked() is args:  # slime's namespace has some 1,500 attributes: look through them once
        return
    unknown = sorted(n for n in vars(args) if n.startswith("fipo_") and n not in _DESTS and n not in _INTERNAL)
    if unknown:
        raise ValueError(f"{unknown[0]} is no FIPO setting; there are {', '.join(_DESTS)}")
    _names_checked = weakref.ref(args)


_names_checked: Callable[[], argparse.Namespace | None] = lambda: None  # noqa: E731


def translate(args: argparse.Namespace) -> FipoConfig:
    """Turn a namespace parsed with ``--loss-type fipo_loss`` into one that an unmodified slime can train with.

    ``loss_type`` becomes ``custom_loss`` with our import path, the FIPO attributes take their effective values (plain
    numbers and strings, as a tracker's config shows them), a user's before-train-step hook is chained behind ours,
    and with ``--fipo-shift-from train`` slime is made to recompute Megatron's log-probs.

    Raises:
        ValueError: from the checks of :func:`fipo_settings`, or for hooks that leave no room for ours.
    """
    if args.custom_loss_function_path is not None:
        raise ValueError("--custom-loss-function-path has no effect with --loss-type fipo_loss; drop one of them")
    if shift_is_apart(args) and not args.get_mismatch_metrics:
        if args.custom_tis_function_path is not None:
            raise ValueError(
                "--custom-tis-function-path has no effect without --use-tis or --get-mismatch-metrics, and"
                " --fipo-shift-from train turns the latter on; add --get-mismatch-metrics or drop"
                " --custom-tis-function-path"
            )
        args.get_mismatch_metrics = True
        args.custom_tis_function_path = MISMATCH_METRICS_PATH
    config = fipo_settings(args)

    effective = {f"fipo_{name}": "none" if value is None else value for name, value in config.as_dict().items()}
    effective["fipo_unclipped"] = not effective.pop("fipo_clip_influence")
    if effective["fipo_unclipped"]:
        effective.update(dict.fromkeys(("fipo_clip_ratio_low", "fipo_clip_ratio_high", "fipo_clip_high_only")))
    effective["fipo_clip_ratio"] = None
    effective["fipo_shift_from"] = args.fipo_shift_from or "ratio"
    effective["fipo_allow_single_step"] = bool(args.fipo_allow_single_step)
    effective["fipo_log_detail"] = bool(args.fipo_log_detail)
    vars(args).update(effective)

    args.loss_type = "custom_loss"
    args.custom_loss_function_path = LOSS_PATH
    args.fipo_chained_hook_path = args.custom_megatron_before_train_step_hook_path
    args.custom_megatron_before_train_step_hook_path = HOOK_PATH
    return config


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
                add_arguments(parser)
            return add_recipe_arguments(parser)

        return add_extended_arguments

    @functools.wraps(parse_args)
    def parse_args_with_fipo(*args, **kwargs):
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


def _finish(args: argparse.Namespace) -> None:
    _check_command_line(args)
    for name in RECIPE_DESTS:  # flags that were not given leave no trace
        if getattr(args, name, None) is None:
            vars(args).pop(name, None)
    if args.loss_type != "fipo_loss":
        for name in _DESTS:  # what --custom-config-path set for the route through custom_loss stays
            if getattr(args, name, None) is None:
                vars(args).pop(name, None)
        return
    config = translate(args)
    from . import loss  # noqa: F401  a slime whose loss path we do not know is refused here, not on the GPUs

    logger.info("FIPO: %s", ", ".join(f"{name}={value}" for name, value in config.as_dict().items()))


def _check_command_line(args: argparse.Namespace) -> None:
    """slime's parser ignores flags that it does not know; a misspelt FIPO flag must not pass for a default."""
    given = [t.partition("=")[0] for t in sys.argv[1:] if t.startswith(("--fipo-", "--no-fipo-"))]
    known = _add_fipo_group(argparse.ArgumentParser())._option_string_actions
    for flag in given:
        if flag not in known:
            raise ValueError(
                f"{flag} is no FIPO flag; there are {', '.join(f for f in known if f.startswith('--fipo-'))}"
            )
    if given and args.loss_type != "fipo_loss":
        raise ValueError(f"{given[0]} needs --loss-type fipo_loss; it is {args.loss_type}")
