"""The flags of ``slime-fipo local``: slime's and Megatron's names and meanings wherever they have one.

Values are checked here as far as they can be without reading a file; what a file holds is checked in ``data.py`` and
``run_directory.py``. The defaults are the main job: ``slime-fipo local`` alone runs it. A number's range is its flag's
type; ranges end where float32 or memory would, so that no value in them ends in an error of torch.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch

from slime_fipo.algorithm import FipoConfig, add_fipo_arguments, fipo_config_from_args, fipo_dests

from ..errors import OneLineParser, UserError
from ..records.arguments import add_record_arguments, record_settings
from .controls import CONTROLS, unit_weights
from .task import ALPHABET, DATA_DIRECTORY, SUMS

SHIPPED = DATA_DIRECTORY / SUMS.name
MAX_PARAMETERS = 2**28  # weights, gradient and Adam's moments are 4 GiB then
MAX_SAMPLES = 10**6  # in a rollout


def number(kind: type, low: float, high: float) -> Callable[[str], float]:
    """An argparse type: an int or a float in [low, high]."""

    def parse(text: str):
        value = kind(text)
        if not low <= value <= high:  # false for NaN too
            raise argparse.ArgumentTypeError(f"{value} is out of range; it must be in [{low:g}, {high:g}]")
        return value

    parse.__name__ = kind.__name__  # argparse prints it: «invalid int value»
    return parse


_COUNT = number(int, 1, 10**6)
_INTERVAL = number(int, 1, 10**9)
_STEPS = number(int, 0, 10**9)
_SEED = number(int, 0, 2**63 - 1)
_LEARNING_RATE = number(float, 1e-30, 1e18)
_BETA = number(float, 0, 0.999999)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="slime-fipo local",
        formatter_class=_HelpFormatter,
        description="Train a small Qwen3-shaped Megatron-Core model with FIPO on this machine. Without arguments: the "
        "main job, from shipped data. The same command again continues a run that was interrupted.",
    )
    _add_run_arguments(parser.add_argument_group("run"))
    _add_data_arguments(parser.add_argument_group("data"))
    _add_rollout_arguments(parser.add_argument_group("rollout and evaluation"))
    _add_training_arguments(parser.add_argument_group("training"))
    _add_base_arguments(parser.add_argument_group("base model (trained from demonstrations unless --load is given)"))
    _add_model_arguments(parser.add_argument_group("model"))
    return add_record_arguments(add_fipo_arguments(parser))


def _add_run_arguments(group) -> None:
    group.add_argument("--save", default="runs/local", help="run directory; everything the run leaves behind is there")
    group.add_argument(
        "--load",
        help="run directory or checkpoint file to start from (weights, optimizer state and rollout counter)",
    )
    group.add_argument("--save-interval", type=_INTERVAL, default=1, help="rollouts between checkpoints")
    group.add_argument("--seed", type=_SEED, default=1234, help="seed of initial weights, base training and sampling")
    group.add_argument(
        "--sampling-stream",
        type=number(int, 0, 2**31 - 1),
        default=0,
        help="another number, other draws in rollouts from the same --seed: what differs then is chance",
    )
    group.add_argument(
        "--num-threads", type=number(int, 1, 1024), default=2, help="CPU threads; results depend on it bit by bit"
    )
    group.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the model lives")


def _add_data_arguments(group) -> None:
    group.add_argument("--prompt-data", default=str(SHIPPED / "train.jsonl"), help="JSONL of prompts and labels")
    group.add_argument("--input-key", default="prompt", help="JSON key of the prompt")
    group.add_argument("--label-key", default="label", help="JSON key of the label")
    group.add_argument(
        "--eval-prompt-data",
        nargs=2,
        metavar=("NAME", "PATH"),
        default=["heldout", str(SHIPPED / "heldout.jsonl")],
        help="name and JSONL of the held-out prompts",
    )
    group.add_argument("--alphabet", default=ALPHABET, help="every character that data may hold; one is one token")
    group.add_argument(
        "--answer-separator",
        default=";",
        help="a response's answer is what follows the last of these, or all of it if there is none; reward 1 if the "
        "answer is the label and the response ended by itself, else 0",
    )
    group.add_argument("--rollout-shuffle", action="store_true", help="shuffle the prompts in every epoch")
    group.add_argument("--rollout-seed", type=_SEED, default=42, help="seed of --rollout-shuffle")


def _add_rollout_arguments(group) -> None:
    group.add_argument("--num-rollout", type=_STEPS, default=16, help="number of rollouts")
    group.add_argument("--rollout-batch-size", type=_COUNT, default=32, help="prompts per rollout")
    group.add_argument("--n-samples-per-prompt", type=_COUNT, default=8, help="responses per prompt")
    group.add_argument("--rollout-max-response-len", type=_COUNT, default=32, help="longest response in tokens")
    group.add_argument("--rollout-temperature", type=number(float, 1e-6, 1e6), default=1.0, help="sampling temperature")
    group.add_argument(
        "--dynamic-sampling",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="DAPO: drop groups whose rewards are all equal and sample other prompts in their place",
    )
    group.add_argument(
        "--max-sampling-rounds",
        type=_COUNT,
        default=4,
        help="sample at most this many times --rollout-batch-size prompts per rollout; what is still missing then is "
        "filled up with groups of equal reward, which have advantage 0",
    )
    group.add_argument("--eval-interval", type=_INTERVAL, default=4, help="rollouts between evaluations")
    group.add_argument(
        "--n-samples-per-eval-prompt", type=number(int, 1, 1000), default=4, help="responses per held-out prompt"
    )


def _add_training_arguments(group) -> None:
    group.add_argument("--loss-type", choices=("policy_loss", "fipo_loss"), default="fipo_loss", help="the objective")
    group.add_argument(
        "--weight-control",
        choices=tuple(CONTROLS),
        help="a placebo in place of FIPO's weights: the same ones in random order within each response or over the"
        " step's batch, or their mean",
    )
    group.add_argument("--advantage-estimator", choices=("grpo",), default="grpo", help="advantage estimator")
    group.add_argument("--global-batch-size", type=_COUNT, default=32, help="samples per optimizer step")
    group.add_argument(
        "--num-steps-per-rollout", type=_COUNT, help="optimizer steps per rollout, in place of --global-batch-size"
    )
    group.add_argument("--eps-clip", type=number(float, 0, 1), default=0.2, help="PPO clip range")
    group.add_argument("--eps-clip-high", type=number(float, 0, 1e6), default=0.28, help="PPO clip upper range")
    group.add_argument(
        "--eps-clip-c", type=number(float, 1, 1e30), help="dual clip of policy_loss (fipo_loss: --fipo-dual-clip-c)"
    )
    group.add_argument(
        "--calculate-per-token-loss",
        action="store_true",
        help="average the loss over a step's tokens, not over its samples' token means",
    )
    group.add_argument(
        "--use-rollout-logprobs",
        action="store_true",
        help="old log-probs are those recorded while sampling, not those recomputed by the trainer",
    )
    group.add_argument(
        "--disable-rewards-normalization",
        dest="rewards_normalization",
        action="store_false",
        help="advantages are the rewards themselves",
    )
    group.add_argument(
        "--disable-grpo-std-normalization",
        dest="grpo_std_normalization",
        action="store_false",
        help="do not divide a group's rewards by their standard deviation (Dr. GRPO)",
    )
    group.add_argument("--lr", type=_LEARNING_RATE, default=1e-4, help="learning rate (Adam)")
    group.add_argument("--weight-decay", type=number(float, 0, 1e6), default=0.01, help="decoupled weight decay")
    group.add_argument("--adam-beta1", type=_BETA, default=0.9, help="Adam beta 1")
    group.add_argument("--adam-beta2", type=_BETA, default=0.98, help="Adam beta 2")
    group.add_argument(
        "--clip-grad", type=number(float, 0, 1e30), default=1.0, help="largest gradient norm; 0: no clipping"
    )


def _add_base_arguments(group) -> None:
    group.add_argument(
        "--demo-data",
        help="JSONL of prompts and responses; not given: the shipped demonstrations for the shipped --prompt-data, the "
        "labels as responses for your own",
    )
    group.add_argument("--demo-response-key", default="response", help="JSON key of the response")
    group.add_argument("--demo-steps", type=_STEPS, default=400, help="optimizer steps")
    group.add_argument("--demo-batch-size", type=_COUNT, default=64, help="demonstrations per step")
    group.add_argument(
        "--demo-lr", type=_LEARNING_RATE, default=2e-3, help="peak learning rate; linear warm-up, cosine decay"
    )


def _add_model_arguments(group) -> None:
    group.add_argument("--num-layers", type=number(int, 1, 1000), default=4, help="transformer layers")
    group.add_argument("--hidden-size", type=_COUNT, default=128, help="hidden size")
    group.add_argument("--ffn-hidden-size", type=_COUNT, default=384, help="MLP hidden size")
    group.add_argument("--num-attention-heads", type=_COUNT, default=4, help="attention heads")
    group.add_argument("--num-query-groups", type=_COUNT, default=2, help="key-value heads")
    group.add_argument("--kv-channels", type=_COUNT, default=32, help="size of an attention head")
    group.add_argument(
        "--init-method-std",
        type=number(float, 1e-30, 1e3),
        default=0.09,
        help="standard deviation of the initial weights",
    )
    group.add_argument("--rotary-base", type=_INTERVAL, default=10000, help="base period of RoPE")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Parse and check; ``--global-batch-size`` is settled, effective settings are in ``args.fipo`` and ``args.record``.

    Raises:
        UserError: one line that names the flag and the fix.
    """
    args = build_parser().parse_args(argv)
    args.record = record_settings(args)
    _check_values(args)
    _settle_batch_sizes(args)
    args.fipo = _objective_settings(args)
    if args.demo_data is None and args.prompt_data == str(SHIPPED / "train.jsonl"):
        args.demo_data = str(SHIPPED / "demonstrations.jsonl")
    return args


def given_arguments(argv: list[str]) -> dict:
    """The values of the flags that stand in ``argv``, however they are spelled, without any default."""
    parser = build_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return vars(parser.parse_args(argv))


def flag_of(dest: str) -> str:
    """The flag that sets ``dest``, for messages."""
    flags = (action.option_strings[0] for action in build_parser()._actions if action.dest == dest)
    return next(flags, "--" + dest.replace("_", "-"))


def _check_values(args: argparse.Namespace) -> None:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here; use --device cpu")
    if args.num_attention_heads % args.num_query_groups:
        raise UserError(
            f"--num-query-groups is {args.num_query_groups}; it must divide --num-attention-heads "
            f"{args.num_attention_heads}"
        )
    if args.n_samples_per_prompt == 1 and (args.dynamic_sampling or args.rewards_normalization):
        raise UserError(
            "--n-samples-per-prompt is 1; a group of one has no reward differences, so take at least 2 (or both "
            "--no-dynamic-sampling and --disable-rewards-normalization)"
        )
    if args.kv_channels % 2:
        raise UserError(f"--kv-channels is {args.kv_channels}; RoPE needs an even number")
    attention = args.hidden_size * args.kv_channels * 2 * (args.num_attention_heads + args.num_query_groups)
    parameters = args.num_layers * (attention + 3 * args.hidden_size * args.ffn_hidden_size)
    if parameters > MAX_PARAMETERS:
        raise UserError(
            f"--num-layers, --hidden-size and the like make a model of {parameters:.1e} parameters; at most"
            f" {MAX_PARAMETERS:.1e}"
        )
    name = args.eval_prompt_data[0]
    if not name.isprintable() or not name or name.rsplit("/")[-1] == "step":
        raise UserError(f"--eval-prompt-data {name!r}: not a name for metrics; choose another, such as heldout")
    if args.record is not None and _lies_in(args.record.folder, Path(args.save, "checkpoints")):
        raise UserError(f"--fipo-record {args.record.folder} is inside the run's checkpoints; choose another folder")
    if args.record is not None and args.weight_control is not None:
        raise UserError("--fipo-record records FIPO's own weights, not those of --weight-control; drop one of them")


def _lies_in(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _settle_batch_sizes(args: argparse.Namespace) -> None:
    samples = args.rollout_batch_size * args.n_samples_per_prompt
    origin = f"{args.rollout_batch_size} prompts x {args.n_samples_per_prompt} samples = {samples}"
    if samples > MAX_SAMPLES:
        raise UserError(f"--rollout-batch-size makes a rollout of {origin} samples; it must be at most {MAX_SAMPLES}")
    if args.num_steps_per_rollout is not None:
        if samples % args.num_steps_per_rollout:
            raise UserError(
                f"--num-steps-per-rollout is {args.num_steps_per_rollout}; it must divide a rollout's {origin} samples"
            )
        args.global_batch_size = samples // args.num_steps_per_rollout
    if args.global_batch_size > samples:
        raise UserError(f"--global-batch-size is {args.global_batch_size}, more than a rollout's {origin} samples")
    if samples % args.global_batch_size:
        raise UserError(f"--global-batch-size is {args.global_batch_size}; it must divide a rollout's {origin} samples")


def _objective_settings(args: argparse.Namespace) -> FipoConfig:
    given = [name for name in fipo_dests() if getattr(args, name, None) is not None]
    if args.loss_type == "policy_loss":
        if given:
            raise UserError(f"{flag_of(given[0])} has no effect with --loss-type policy_loss; drop it or use fipo_loss")
        if args.weight_control is not None:
            raise UserError("--weight-control has no effect with --loss-type policy_loss; drop it or use fipo_loss")
        if args.eps_clip_c is not None and not 1 + args.eps_clip_high < args.eps_clip_c < math.inf:
            bound = 1 + args.eps_clip_high
            raise UserError(f"--eps-clip-c is {args.eps_clip_c:g}; it must be above 1 + --eps-clip-high = {bound:g}")
        return unit_weights(args.eps_clip_c)
    if args.eps_clip_c is not None:
        raise UserError("--eps-clip-c belongs to --loss-type policy_loss; use --fipo-dual-clip-c with fipo_loss")
    if args.global_batch_size == args.rollout_batch_size * args.n_samples_per_prompt:
        raise UserError(
            f"--global-batch-size {args.global_batch_size} is one optimizer step per rollout, where FIPO's weights are "
            "all 1; make it smaller, or use --loss-type policy_loss"
        )
    try:
        return fipo_config_from_args(args)
    except ValueError as error:
        raise UserError(str(error)) from None
