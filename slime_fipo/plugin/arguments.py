"""FIPO's settings as slime sees them: the flags in slime's parser, what they require of slime's own flags, and the
namespace that makes an unmodified slime in a Ray actor load our loss.

The objective's own flags and bounds live in ``slime_fipo.algorithm``, the types of values in ``values.py``, the loss
itself in ``loss.py``. Nothing here imports slime, so that a launcher can import it first.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..algorithm import FipoConfig, add_fipo_arguments, fipo_config_from_args
from ..errors import UserError
from ..recipes.arguments import add_recipe_arguments
from ..records.arguments import RECORD_DESTS, RecordSettings, add_record_arguments, record_settings
from .config_files import ROLE_CONFIG, role_overrides, with_overrides
from .spelling import key_correction, names_fipo
from .values import dest_of, flag_of, read_setting, require_boolean, require_count, require_number, require_text

LOSS_PATH = "slime_fipo.plugin.loss.fipo_loss_function"
HOOK_PATH = "slime_fipo.plugin.loss.before_train_step_hook"
ROLLOUT_DATA_HOOK_PATH = "slime_fipo.plugin.recorder.rollout_data_hook"
MISMATCH_METRICS_PATH = "slime_fipo.plugin.loss.mismatch_metrics_function"

# Written into the namespace by us, never by a user.
_INTERNAL = ("fipo_step_id", "fipo_chained_hook_path", "fipo_chained_rollout_data_hook_path")
_SHIFT_FROM = ("ratio", "train")

# What FIPO reads of slime's own settings, and what each must be where it is set.
SLIME_SETTINGS = {
    "advantage_estimator": require_text,
    "compute_advantages_and_returns": require_boolean,
    "custom_tis_function_path": require_text,
    "eps_clip": require_number,
    "eps_clip_c": require_number,
    "eps_clip_high": require_number,
    "get_mismatch_metrics": require_boolean,
    "global_batch_size": require_count,
    "keep_old_actor": require_boolean,
    "n_samples_per_prompt": require_count,
    "num_steps_per_rollout": require_count,
    "rollout_batch_size": require_count,
    "use_rollout_logprobs": require_boolean,
    "use_wandb": require_boolean,
}
# What the rollout side cuts steps by, in every slime: an actor's own value would change its learning rate alone.
_ROLLOUT_SIZES = ("global_batch_size", "n_samples_per_prompt", "num_steps_per_rollout", "rollout_batch_size")
# Where our functions stand; an actor's own value would take their place.
_OUR_PATHS = ("custom_loss_function_path", "custom_megatron_before_train_step_hook_path")


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
    return _add_record_group(_add_fipo_group(parser))


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


def _add_record_group(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    add_record_arguments(parser)
    group = next(g for g in parser._action_groups if g.title == "FIPO records")
    group.add_argument(
        "--fipo-record-wandb",
        action="store_true",
        default=None,
        help="put one response's heatmap into slime's Weights & Biases run whenever a step is recorded",
    )
    return parser


_GROUP = _add_record_group(_add_fipo_group(argparse.ArgumentParser(add_help=False)))
_SETTINGS = {action.dest: action for action in _GROUP._actions}
_RECIPE_SETTINGS = {a.dest: a for a in add_recipe_arguments(argparse.ArgumentParser(add_help=False))._actions}
FIPO_DESTS = tuple(_SETTINGS)
FIPO_FLAGS = frozenset(_GROUP._option_string_actions)
OWN_FLAGS = FIPO_FLAGS | {flag for action in _RECIPE_SETTINGS.values() for flag in action.option_strings}


def uses_fipo(args: argparse.Namespace) -> bool:
    """Whether slime will train with our loss: by name, or by the loss function's import path."""
    by_path = args.loss_type == "custom_loss" and getattr(args, "custom_loss_function_path", None) == LOSS_PATH
    return args.loss_type == "fipo_loss" or by_path


def check_stays_on(loss_type: str | None, args: argparse.Namespace, file: str) -> None:
    """Refuse a YAML file that turns off what the command line turned on.

    Args:
        loss_type: the command line's.
        args: with the file's values over the command line's, as slime trains with them.
        file: its flag and path, for the message.
    """
    if loss_type == "fipo_loss" and not uses_fipo(args):
        raise UserError(
            f"loss_type: {args.loss_type} in {file} wins over --loss-type fipo_loss and turns FIPO off; drop one of"
            " the two"
        )


def fipo_settings(args: argparse.Namespace) -> FipoConfig:
    """The effective settings of a namespace as slime's training actors have it, with everything checked that FIPO needs
    of slime's flags.

    Raises:
        ValueError: names the flag and what to do instead.
    """
    _check_names(args)
    values = _values(args)
    config = fipo_config_from_args(values)
    _check_slime(values, config)
    return config


def is_on(args: argparse.Namespace, name: str) -> bool:
    """Whether a switch of ours is on, such as ``fipo_log_detail``; a YAML file may say it as a text.

    Raises:
        UserError: the value is no boolean.
    """
    return bool(read_setting(_SETTINGS[name], getattr(args, name, None)))


def _values(args: argparse.Namespace) -> argparse.Namespace:
    """Our settings and what we read of slime's, each of its type or None."""
    slime = {name: getattr(args, name, None) for name in SLIME_SETTINGS}
    with _naming(_files(args)):
        own = {name: read_setting(action, getattr(args, name, None)) for name, action in _SETTINGS.items()}
        check_values(slime)
    if hasattr(args, "fipo_chained_hook_path"):
        # translate() wrote the sides; slime then put an actor's shorthand over that again.
        own["fipo_clip_ratio"] = None
    return argparse.Namespace(**slime, **own)


def check_values(values: Mapping[str, Any], files: Sequence[str] = ()) -> None:
    """Refuse values that are not of their setting's type, of our settings and of those that FIPO reads of slime's.

    Args:
        values: name -> value; None is not set, and other names are not looked at.
        files: flags and paths of the files that the values may come from, for the message.

    Raises:
        UserError: names the flag and how to write the value.
    """
    with _naming(files):
        for name, value in values.items():
            if value is not None and name in SLIME_SETTINGS:
                SLIME_SETTINGS[name](name, value)
            elif name in _SETTINGS or name in _RECIPE_SETTINGS:
                read_setting((_SETTINGS | _RECIPE_SETTINGS)[name], value)


def _files(args: argparse.Namespace) -> list[str]:
    named = {flag: getattr(args, dest_of(flag), None) for flag in ("--custom-config-path", ROLE_CONFIG)}
    return [f"{flag} {path}" for flag, path in named.items() if path is not None]


@contextlib.contextmanager
def _naming(files: Sequence[str]) -> Iterator[None]:
    """Values of flags have passed argparse, so what is not of its type comes from a file."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error} in {' or '.join(files)}" if files else str(error)) from None


def _check_slime(args: argparse.Namespace, config: FipoConfig) -> None:
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

    if shift_is_apart(args) and not args.get_mismatch_metrics:
        raise ValueError(
            "--fipo-shift-from train with --use-rollout-logprobs needs Megatron's log-probs, which slime recomputes"
            f" with --get-mismatch-metrics --custom-tis-function-path {MISMATCH_METRICS_PATH}; add both"
            " (python3 -m slime_fipo with --loss-type fipo_loss does)"
        )
    _check_recording(args)
    _check_steps_per_rollout(args)


def _check_recording(args: argparse.Namespace) -> None:
    recording = _recording(*(getattr(args, name) for name in RECORD_DESTS))
    if recording is None and args.fipo_record_wandb:
        raise UserError("--fipo-record-wandb has no effect without --fipo-record DIR; add it or drop it")
    if args.fipo_record_wandb and not args.use_wandb:
        raise UserError("--fipo-record-wandb has no effect without --use-wandb; add it or drop --fipo-record-wandb")


@functools.lru_cache(maxsize=8)  # it looks around the folder, and the loss checks its settings at every micro-batch
def _recording(*values) -> RecordSettings | None:
    return record_settings(argparse.Namespace(**dict(zip(RECORD_DESTS, values, strict=True))))


def _arrange_recording(args: argparse.Namespace) -> None:
    """With ``--fipo-record``, have slime call the recorder's hook, and the recorder the user's."""
    recording = _recording(*(getattr(args, name) for name in RECORD_DESTS))
    if recording is None:
        return
    args.fipo_record = os.path.abspath(recording.folder)  # training actors have other working directories
    args.fipo_record_samples, args.fipo_record_interval = recording.samples, recording.interval
    args.fipo_chained_rollout_data_hook_path = args.rollout_data_postprocess_path
    args.rollout_data_postprocess_path = ROLLOUT_DATA_HOOK_PATH


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


def check_keys(keys: Iterable[str], file: str) -> None:
    """Refuse keys of a YAML file that mean to be settings of ours and are not, so that slime would ignore them.

    Args:
        keys: of the file.
        file: its flag and path, for the message.
    """
    known = (*_SETTINGS, *_RECIPE_SETTINGS)
    for key in keys:
        if key not in known and (message := key_correction(key, OWN_FLAGS)):
            raise UserError(f"{message} in {file}")


def _check_names(args: argparse.Namespace) -> None:
    """Refuse attributes that name FIPO and are no setting, such as a misspelt key of ``--custom-config-path``."""
    for name in vars(args):
        if "fipo" in name.lower() and name not in _SETTINGS and name not in _INTERNAL:
            with _naming(_files(args)):
                raise UserError(key_correction(name, FIPO_FLAGS))


def actor_args(args: argparse.Namespace) -> argparse.Namespace:
    """The driver's namespace as slime hands it to its training actors: with ``--megatron-config-path`` over it.

    Raises:
        UserError: the file cannot be used, or it overrides what decides whether and how FIPO runs.
    """
    path = getattr(args, "megatron_config_path", None)
    if path is None:
        return args
    roles, file = role_overrides(path), f"{ROLE_CONFIG} {path}"
    overrides = roles.get("actor", {})
    by_path = overrides.get("custom_loss_function_path") == LOSS_PATH
    named = [role for role, values in roles.items() if names_fipo(values.get("loss_type"))]
    if named or by_path or (uses_fipo(args) and "loss_type" in overrides):
        raise UserError(
            f"loss_type of the {(*named, 'actor')[0]} in {file} wins over the command line and does not turn FIPO on;"
            " drop it there and put --loss-type fipo_loss on the command line"
        )
    if uses_fipo(args):
        check_keys(overrides, file)
        records = overrides.get("fipo_record", getattr(args, "fipo_record", None)) is not None
        for name in (*_ROLLOUT_SIZES, *_OUR_PATHS, *(["rollout_data_postprocess_path"] if records else [])):
            if name in overrides:
                raise UserError(
                    f"{name} of the actor in {file} would not fit the run's; drop it and use {flag_of(name)}"
                )
    elif args.loss_type != "custom_loss" and (idle := [name for name in overrides if name in _SETTINGS]):
        raise UserError(f"{idle[0]} of the actor in {file} needs --loss-type fipo_loss; it is {args.loss_type}")
    with _naming([file]):
        return with_overrides(args, overrides)


def translate(args: argparse.Namespace) -> FipoConfig:
    """Turn a namespace parsed with ``--loss-type fipo_loss`` into one that an unmodified slime can train with.

    ``loss_type`` becomes ``custom_loss`` with our import path, the FIPO attributes take the effective values that the
    training actors will have (plain numbers and strings, as a tracker's config shows them), a user's hooks are
    chained to ours, and with ``--fipo-shift-from train`` slime is made to recompute Megatron's log-probs.

    Raises:
        ValueError: from the checks of :func:`fipo_settings`, or for hooks that leave no room for ours.
    """
    actor = actor_args(args)
    if args.custom_loss_function_path is not None:
        raise UserError("--custom-loss-function-path has no effect with --loss-type fipo_loss; drop one of them")
    if shift_is_apart(actor) and not actor.get_mismatch_metrics:
        if actor.custom_tis_function_path is not None:
            raise UserError(
                "--custom-tis-function-path has no effect without --use-tis or --get-mismatch-metrics, and"
                " --fipo-shift-from train turns the latter on; add --get-mismatch-metrics or drop"
                " --custom-tis-function-path"
            )
        args.get_mismatch_metrics = True
        args.custom_tis_function_path = MISMATCH_METRICS_PATH
        actor = actor_args(args)
    config = fipo_settings(actor)

    effective = {name: read_setting(action, getattr(actor, name, None)) for name, action in _SETTINGS.items()}
    effective |= {f"fipo_{name}": "none" if value is None else value for name, value in config.as_dict().items()}
    effective["fipo_unclipped"] = not effective.pop("fipo_clip_influence")
    if effective["fipo_unclipped"]:  # what has no effect is left out: it would contradict when it is read again
        effective.update(dict.fromkeys(("fipo_clip_ratio_low", "fipo_clip_ratio_high", "fipo_clip_high_only")))
    if effective["fipo_clip_high_only"]:
        effective["fipo_clip_ratio_low"] = None
    if effective["fipo_dual_clip_c"] == "none":
        effective["fipo_max_dual_clipped_tokens"] = None
    effective["fipo_clip_ratio"] = None
    effective["fipo_shift_from"] = effective["fipo_shift_from"] or "ratio"
    effective["fipo_allow_single_step"] = bool(effective["fipo_allow_single_step"])
    effective["fipo_log_detail"] = bool(effective["fipo_log_detail"])
    effective["fipo_record_wandb"] = bool(effective["fipo_record_wandb"])
    vars(args).update(effective)

    args.loss_type = "custom_loss"
    args.custom_loss_function_path = LOSS_PATH
    args.fipo_chained_hook_path = args.custom_megatron_before_train_step_hook_path
    args.custom_megatron_before_train_step_hook_path = HOOK_PATH
    _arrange_recording(args)
    return config
