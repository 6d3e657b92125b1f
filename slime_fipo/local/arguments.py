"""The flags of ``slime-fipo local``: slime's and Megatron's names and meanings wherever they have one.

Values are checked here as far as they can be without reading a file; what a file holds is checked in ``data.py`` and
``run_directory.py``. The defaults are the main job: ``slime-fipo local`` alone runs it.
"""

from __future__ import annotations

import argparse
import math

import torch

from slime_fipo.algorithm import FipoConfig, add_fipo_arguments, fipo_config_from_args, fipo_dests

from ..errors import OneLineParser, UserError
from .task import ALPHABET, DATA_DIRECTORY, SUMS

SHIPPED = DATA_DIRECTORY / SUMS.name


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
    return add_fipo_arguments(parser)


def _add_run_arguments(group) -> None:
    group.add_argument("--save", default="runs/local", help="run directory; everything the run leaves behind is there")
    group.add_argument(
        "--load",
        help="run directory or checkpoint file to start from (weights, optimizer state and rollout counter)",
    )
    group.add_argument("--save-interval", type=int, default=1, help="rollouts between checkpoints")
    group.add_argument("--seed", type=int, default=1234, help="seed of initial weights, base training and sampling")
    group.add_argument("--num-threads", type=int, default=2, help="CPU threads; results depend on it bit by bit")
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
    group.add_argument("--rollout-seed", type=int, default=42, help="seed of --rollout-shuffle")


def _add_rollout_arguments(group) -> None:
    group.add_argument("--num-rollout", type=int, default=16, help="number of rollouts")
    group.add_argument("--rollout-batch-size", type=int, default=32, help="prompts per rollout")
    group.add_argument("--n-samples-per-prompt", type=int, default=8, help="responses per prompt")
    group.add_argument("--rollout-max-response-len", type=int, default=32, help="longest response in tokens")
    group.add_argument("--rollout-temperature", type=float, default=1.0, help="sampling temperature")
    group.add_argument(
        "--dynamic-sampling",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="DAPO: drop groups whose rewards are all equal and sample other prompts in their place",
    )
    group.add_argument(
        "--max-sampling-rounds",
        type=int,
        default=4,
        help="sample at most this many times --rollout-batch-size prompts per rollout; what is still missing then is "
        "filled up with groups of equal reward, which have advantage 0",
    )
    group.add_argument("--eval-interval", type=int, default=4, help="rollouts between evaluations")
    group.add_argument("--n-samples-per-eval-prompt", type=int, default=4, help="responses per held-out prompt")


def _add_training_arguments(group) -> None:
    group.add_argument("--loss-type", choices=("policy_loss", "fipo_loss"), default="fipo_loss", help="the objective")
    group.add_argument("--advantage-estimator", choices=("grpo",), default="grpo", help="advantage estimator")
    group.add_argument("--global-batch-size", type=int, default=32, help="samples per optimizer step")
    group.add_argument(
        "--num-steps-per-rollout", type=int, help="optimizer steps per rollout, in place of --global-batch-size"
    )
    group.add_argument("--eps-clip", type=float, default=0.2, help="PPO clip range")
    group.add_argument("--eps-clip-high", type=float, default=0.28, help="PPO clip upper range")
    group.add_argument("--eps-clip-c", type=float, help="dual clip of policy_loss (fipo_loss: --fipo-dual-clip-c)")
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
    group.add_argument(
        "--slime-root",
        help="checkout of slime whose real loss_function, with the FIPO plugin, takes the place of the engine's own",
    )
    group.add_argument("--lr", type=float, default=1e-4, help="learning rate (Adam)")
    group.add_argument("--weight-decay", type=float, default=0.01, help="decoupled weight decay")
    group.add_argument("--adam-beta1", type=float, default=0.9, help="Adam beta 1")
    group.add_argument("--adam-beta2", type=float, default=0.98, help="Adam beta 2")
    group.add_argument("--clip-grad", type=float, default=1.0, help="largest gradient norm; 0: no clipping")


def _add_base_arguments(group) -> None:
    group.add_argument(
        "--demo-data",
        help="JSONL of prompts and responses; not given: the shipped demonstrations for the shipped --prompt-data, the "
        "labels as responses for your own",
    )
    group.add_argument("--demo-response-key", default="response", help="JSON key of the response")
    group.add_argument("--demo-steps", type=int, default=400, help="optimizer steps")
    group.add_argument("--demo-batch-size", type=int, default=64, help="demonstrations per step")
    group.add_argument("--demo-lr", type=float, default=2e-3, help="peak learning rate; linear warm-up, cosine decay")


def _add_model_arguments(group) -> None:
    group.add_argument("--num-layers", type=int, default=4, help="transformer layers")
    group.add_argument("--hidden-size", type=int, default=128, help="hidden size")
    group.add_argument("--ffn-hidden-size", type=int, default=384, help="MLP hidden size")
    group.add_argument("--num-attention-heads", type=int, default=4, help="attention heads")
    group.add_argument("--num-query-groups", type=int, default=2, help="key-value heads")
    group.add_argument("--kv-channels", type=int, default=32, help="size of an attention head")
    group.add_argument("--init-method-std", type=float, default=0.09, help="standard deviation of the initial weights")
    group.add_argument("--rotary-base", type=int, default=10000, help="base period of RoPE")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Parse and check; ``--global-batch-size`` is settled and the effective FIPO settings are in ``args.fipo``.

    Raises:
        UserError: one line that names the flag and the fix.
    """
    args = build_parser().parse_args(argv)
    _check_numbers(args)
    _settle_batch_sizes(args)
    args.fipo = _objective_settings(args)
    if args.demo_data is None and args.prompt_data == str(SHIPPED / "train.jsonl"):
        args.demo_data = str(SHIPPED / "demonstrations.jsonl")
    return args


_AT_LEAST = {
    1: "save_interval num_threads rollout_batch_size n_samples_per_prompt rollout_max_response_len max_sampling_rounds"
    " eval_interval n_samples_per_eval_prompt demo_batch_size num_layers hidden_size ffn_hidden_size"
    " num_attention_heads num_query_groups kv_channels rotary_base",
    0: "num_rollout demo_steps seed rollout_seed weight_decay clip_grad eps_clip eps_clip_high",
}
_ABOVE_ZERO = "rollout_temperature lr demo_lr init_method_std"


def flag_of(dest: str) -> str:
    """The flag that sets ``dest``, for messages."""
    flags = (action.option_strings[0] for action in build_parser()._actions if action.dest == dest)
    return next(flags, "--" + dest.replace("_", "-"))


def _check_numbers(args: argparse.Namespace) -> None:
    for bound, names in _AT_LEAST.items():
        for name in names.split():
            if not bound <= getattr(args, name) < math.inf:
                raise UserError(f"{flag_of(name)} is {getattr(args, name)}; it must be at least {bound}")
    for name in _ABOVE_ZERO.split():
        if not 0 < getattr(args, name) < math.inf:
            raise UserError(f"{flag_of(name)} is {getattr(args, name)}; it must be above 0")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(args, name) < 1:
            raise UserError(f"{flag_of(name)} is {getattr(args, name)}; it must be in [0, 1)")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here; use --device cpu")
    if args.eps_clip > 1:
        raise UserError(f"--eps-clip is {args.eps_clip}; it must be at most 1")
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


def _settle_batch_sizes(args: argparse.Namespace) -> None:
    samples = args.rollout_batch_size * args.n_samples_per_prompt
    origin = f"{args.rollout_batch_size} prompts x {args.n_samples_per_prompt} samples = {samples}"
    if args.num_steps_per_rollout is not None:
        if args.num_steps_per_rollout < 1 or samples % args.num_steps_per_rollout:
            raise UserError(
                f"--num-steps-per-rollout is {args.num_steps_per_rollout}; it must divide a rollout's {origin} samples"
            )
        args.global_batch_size = samples // args.num_steps_per_rollout
    if args.global_batch_size < 1:
        raise UserError(f"--global-batch-size is {args.global_batch_size}; it must be at least 1")
    if args.global_batch_size > samples:
        raise UserError(f"--global-batch-size is {args.global_batch_size}, more than a rollout's {origin} samples")
    if samples % args.global_batch_size:
        raise UserError(f"--global-batch-size is {args.global_batch_size}; it must divide a rollout's {origin} samples")


def _objective_settings(args: argparse.Namespace) -> FipoConfig:
    given = [name for name in fipo_dests() if getattr(args, name, None) is not None]
    if args.loss_type == "policy_loss":
        if given:
            raise UserError(f"{flag_of(given[0])} has no effect with --loss-type policy_loss; drop it or use fipo_loss")
        if args.eps_clip_c is not None and not 1 + args.eps_clip_high < args.eps_clip_c < math.inf:
            bound = 1 + args.eps_clip_high
            raise UserError(f"--eps-clip-c is {args.eps_clip_c:g}; it must be above 1 + --eps-clip-high = {bound:g}")
        # FIPO with every weight at 1 is the PPO loss itself, and shows what Future-KL would have been.
        return FipoConfig(
            clip_ratio_low=0.0,
            clip_ratio_high=0.0,
            safety_thresh=None,
            dual_clip_c=args.eps_clip_c,
            max_dual_clipped_tokens=None,
        )
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
