"""What follows from a train command's flags: sizes, the objective that runs, the rewards. Nothing here judges them."""

from __future__ import annotations

import argparse
import re

from ..plugin.arguments import LOSS_PATH

OUR_REWARD = "slime_fipo.recipes.reward.dapo_math_reward"
OUR_FILTER = "slime_fipo.recipes.filters.accuracy_varies"
OUR_EVAL_LOG = "slime_fipo.recipes.evaluation.log_eval_rollout_data"

# Billions of parameters up to which the paper's 7B settings, and from which its 32B settings apply; between: either.
SMALL, LARGE = 15.0, 20.0
MOST_STEPS = 4096


def objective(args: argparse.Namespace) -> str:
    """``--loss-type``, with FIPO's name for the route through ``custom_loss`` too."""
    by_path = args.loss_type == "custom_loss" and args.custom_loss_function_path == LOSS_PATH
    return "fipo_loss" if by_path else args.loss_type


# -- batches --


def samples_per_rollout(args: argparse.Namespace) -> int | None:
    return args.rollout_batch_size * args.n_samples_per_prompt if args.rollout_batch_size else None


def global_batch_size(args: argparse.Namespace) -> int | None:
    """Samples per step; None if sizes are missing or there are more steps than samples."""
    samples = samples_per_rollout(args)
    if args.global_batch_size is None and args.num_steps_per_rollout and samples:
        return samples // args.num_steps_per_rollout or None
    return args.global_batch_size


def steps_per_rollout(args: argparse.Namespace) -> int | None:
    """Optimizer steps per rollout as slime takes them: whole batches only. None if sizes are missing."""
    samples, batch = samples_per_rollout(args), global_batch_size(args)
    return samples // batch if samples and batch else None


def decay_steps(args: argparse.Namespace) -> int | None:
    """Optimizer steps of Megatron's learning-rate schedule, which slime counts in samples over the whole run."""
    if args.lr_decay_iters is not None:
        return args.lr_decay_iters
    samples, batch = samples_per_rollout(args), global_batch_size(args)
    return args.num_rollout * samples // batch if args.num_rollout and samples and batch else None


def nearest_batch(args: argparse.Namespace, batch: int) -> int | None:
    """The --global-batch-size nearest to ``batch`` that divides a rollout and spreads over all data-parallel ranks."""
    samples = samples_per_rollout(args)
    unit = (data_parallel_size(args) or 1) * args.micro_batch_size
    fewest = 2 if objective(args) == "fipo_loss" else 1  # one step leaves FIPO without effect
    whole = [samples // steps for steps in range(fewest, MOST_STEPS + 1) if samples % steps == 0]
    return min((size for size in whole if size % unit == 0), key=lambda size: (abs(size - batch), size), default=None)


def data_parallel_size(args: argparse.Namespace) -> int | None:
    """None if the model-parallel sizes do not divide the GPUs."""
    world = args.actor_num_nodes * args.actor_num_gpus_per_node
    model = args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size
    return world // model if world % model == 0 else None


# -- the model --


def billions_of_parameters(args: argparse.Namespace) -> float | None:
    """Rough size of the model that the flags describe, all experts included; None if they do not say."""
    if None in (args.num_layers, args.hidden_size, args.ffn_hidden_size, args.num_attention_heads, args.vocab_size):
        return None
    expert_layers = _expert_layers(args)
    if expert_layers is None:
        return None
    head = args.kv_channels or args.hidden_size // args.num_attention_heads
    groups = args.num_query_groups if args.group_query_attention else None
    attention = (
        2 * args.num_attention_heads
        + 2 * (groups or args.num_attention_heads)
        + (args.num_attention_heads if args.attention_output_gate else 0)
    )
    experts = (args.num_experts or 0) * (args.moe_ffn_hidden_size or args.ffn_hidden_size)
    shared = args.moe_shared_expert_intermediate_size or 0
    widths = (args.num_layers - expert_layers) * args.ffn_hidden_size + expert_layers * (experts + shared)
    embeddings = args.vocab_size * (2 if args.untie_embeddings_and_output_weights else 1)
    mlp = (3 if args.swiglu else 2) * widths
    return args.hidden_size * (args.num_layers * attention * head + mlp + embeddings) / 1e9


def _expert_layers(args: argparse.Namespace) -> int | None:
    """Layers with experts: --moe-layer-freq N (every N-th, from the first) or a list such as [0]*1+[1]*45."""
    if args.num_experts is None:
        return 0
    frequency = re.sub(r"\s", "", args.moe_layer_freq or "1")
    if re.fullmatch(r"[1-9]\d{0,5}", frequency):
        return -(-args.num_layers // int(frequency))
    count = layers = 0
    for term in frequency.split("+"):
        match = re.fullmatch(r"\[([01](?:,[01])*)\](?:\*(\d{1,5}))?", term)
        if match is None:
            return None
        pattern, times = match[1].split(","), int(match[2] or 1)
        count += times * pattern.count("1")
        layers += times * len(pattern)
    return count if layers == args.num_layers else None


def longest_sequence(args: argparse.Namespace) -> int | None:
    if args.rollout_max_response_len is None:
        return None
    longest = (args.rollout_max_prompt_len or 0) + args.rollout_max_response_len
    return min(longest, args.rollout_max_context_len) if args.rollout_max_context_len else longest


# -- rewards --


def shaped(args: argparse.Namespace) -> bool:
    return args.custom_rm_path == OUR_REWARD


def is_dapo(rm_type: str | None) -> bool:
    """Whether slime's reward of that name is DAPO's verifier, which returns score and accuracy."""
    return (rm_type or "").removeprefix("boxed_") == "dapo"


def lacks_accuracy(rm_type: str | None) -> bool:
    """Whether slime's reward of that name returns a number; what a remote one returns is not known."""
    return not is_dapo(rm_type) and rm_type != "remote_rm"
