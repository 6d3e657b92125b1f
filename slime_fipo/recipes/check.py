"""``slime-fipo check``: what a train command will do other than its author thinks, said before any GPU is taken.

Each rule is a generator over the parsed command that yields findings; ``effective_recipe`` is the table beside the
paper's. What is read: the command, the heads of its data files, and the checkpoints' ``config.json``.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..algorithm import FipoConfig
from ..plugin.arguments import translate
from .command import Command, CommandError, parse_command

OUR_REWARD = "slime_fipo.recipes.reward.dapo_math_reward"
OUR_FILTER = "slime_fipo.recipes.filters.accuracy_varies"
ROWS_READ = 100
# Billions of parameters up to which the paper's 7B settings, and from which its 32B settings apply; between: either.
SMALL, LARGE = 15.0, 20.0


@dataclass(frozen=True)
class Finding:
    """``error``: the run breaks or is another one than was asked for. ``warning``: it departs from the recipe."""

    severity: str
    message: str


def _error(message: str) -> Finding:
    return Finding("error", message)


def _warning(message: str) -> Finding:
    return Finding("warning", message)


# -- what follows from the flags --


def steps_per_rollout(args: argparse.Namespace) -> int | None:
    """Optimizer steps per rollout as slime takes them: whole batches only. None if sizes are missing."""
    samples, batch = samples_per_rollout(args), global_batch_size(args)
    return samples // batch if samples and batch else None


def samples_per_rollout(args: argparse.Namespace) -> int | None:
    return args.rollout_batch_size * args.n_samples_per_prompt if args.rollout_batch_size else None


def global_batch_size(args: argparse.Namespace) -> int | None:
    if args.global_batch_size is None and args.num_steps_per_rollout and samples_per_rollout(args):
        return samples_per_rollout(args) // args.num_steps_per_rollout
    return args.global_batch_size


def billions_of_parameters(args: argparse.Namespace) -> float | None:
    """Rough size of the dense model that the flags describe; None if they do not."""
    if None in (args.num_layers, args.hidden_size, args.ffn_hidden_size, args.num_attention_heads, args.vocab_size):
        return None
    head = args.kv_channels or args.hidden_size // args.num_attention_heads
    groups = args.num_query_groups if args.group_query_attention else None
    attention = (
        2 * args.num_attention_heads
        + 2 * (groups or args.num_attention_heads)
        + (args.num_attention_heads if args.attention_output_gate else 0)
    )
    mlp = (3 if args.swiglu else 2) * args.ffn_hidden_size
    embeddings = args.vocab_size * (2 if args.untie_embeddings_and_output_weights else 1)
    return args.hidden_size * (args.num_layers * (attention * head + mlp) + embeddings) / 1e9


def longest_sequence(args: argparse.Namespace) -> int | None:
    if args.rollout_max_response_len is None:
        return None
    longest = (args.rollout_max_prompt_len or 0) + args.rollout_max_response_len
    return min(longest, args.rollout_max_context_len) if args.rollout_max_context_len else longest


def shaped(args: argparse.Namespace) -> bool:
    return args.custom_rm_path == OUR_REWARD


# -- rules --


def _launcher(command: Command, config: FipoConfig | None) -> Iterator[Finding]:
    args = command.args
    for flag, close in command.misspelt:
        hint = f"; did you mean {close}?" if close else "; slime-fipo has none of that name"
        yield _error(f"{flag} is no flag that slime knows, and slime ignores such flags silently{hint}")
    if not command.launcher and args.loss_type == "fipo_loss":
        yield _error(
            f"--loss-type fipo_loss is unknown to {command.script} alone; run python3 -m slime_fipo {command.script} …"
        )
    if not command.launcher and args.overlong_buffer_len is not None:
        yield _error(
            f"--overlong-buffer-len is ignored by {command.script} alone; run python3 -m slime_fipo {command.script} …"
        )
    stale = (command.script or "").endswith("train_async.py") or "fully_async" in (args.rollout_function_path or "")
    if stale and not args.use_rollout_logprobs and not args.use_tis:
        yield _warning(
            "asynchronous rollouts come from older weights, but Megatron's recomputed log-probs do not show that: add"
            " --use-rollout-logprobs (or --use-tis)"
        )


def _batches(command: Command, config: FipoConfig | None) -> Iterator[Finding]:
    args = command.args
    samples, batch = samples_per_rollout(args), global_batch_size(args)
    if samples is None:
        yield _error("--rollout-batch-size is missing; slime requires it")
        return
    if batch is None:
        yield _error("--global-batch-size is missing; add it or --num-steps-per-rollout 8")
        return
    if args.num_steps_per_rollout and samples // args.num_steps_per_rollout != batch:
        yield _error(
            f"--global-batch-size {batch} is not the {samples} samples of a rollout over --num-steps-per-rollout"
            f" {args.num_steps_per_rollout}; drop one of the two"
        )
    elif batch > samples:
        yield _error(f"--global-batch-size {batch} is more than a rollout's {samples} samples; make it smaller")
    elif samples % batch:
        yield _error(
            f"--global-batch-size {batch} does not divide a rollout's {samples} samples: {samples % batch} of them are"
            f" generated and never trained on; use {samples // max(samples // batch, 1)} or another divisor"
        )
    if args.n_samples_per_prompt == 1 and args.advantage_estimator == "grpo":
        yield _error("--n-samples-per-prompt 1 leaves GRPO no group to compare with: every advantage is 0; use 16")
    if args.over_sampling_batch_size is not None and args.over_sampling_batch_size < args.rollout_batch_size:
        yield _error(
            f"--over-sampling-batch-size {args.over_sampling_batch_size} is below --rollout-batch-size"
            f" {args.rollout_batch_size}; make it at least that"
        )
    data_parallel = _data_parallel_size(args)
    if data_parallel and batch % (data_parallel * args.micro_batch_size):
        yield _error(
            f"--global-batch-size {batch} does not divide over {data_parallel} data-parallel ranks"
            f" × --micro-batch-size {args.micro_batch_size}; use a multiple of {data_parallel * args.micro_batch_size}"
        )
    if args.num_rollout is None and args.num_epoch is None:
        yield _error("--num-rollout is missing; add it or --num-epoch")
    if args.use_dynamic_batch_size and args.max_tokens_per_gpu is None:
        yield _error("--use-dynamic-batch-size needs --max-tokens-per-gpu; add it")
    if args.rollout_temperature <= 0:
        yield _error(f"--rollout-temperature {args.rollout_temperature:g} is no policy to train; use 1.0")


def _data_parallel_size(args: argparse.Namespace) -> int | None:
    """None if the model-parallel sizes do not divide the GPUs."""
    world = args.actor_num_nodes * args.actor_num_gpus_per_node
    model = args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size
    return world // model if world % model == 0 else None


def _parallelism(command: Command, config: FipoConfig | None) -> Iterator[Finding]:
    args = command.args
    world = args.actor_num_nodes * args.actor_num_gpus_per_node
    tp, pp, cp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.context_parallel_size
    if _data_parallel_size(args) is None:
        flags = (
            f"--tensor-model-parallel-size {tp} × --pipeline-model-parallel-size {pp} × --context-parallel-size {cp}"
        )
        yield _error(f"{flags} = {tp * pp * cp} does not divide the {world} GPUs of the actor; change one of them")
    for name in ("num_attention_heads", "num_query_groups"):
        heads = getattr(args, name)
        if heads and heads % tp:
            yield _error(
                f"--tensor-model-parallel-size {tp} does not divide --{name.replace('_', '-')} {heads}; use a divisor"
            )
    if args.num_layers and args.num_layers % pp:
        yield _warning(
            f"--pipeline-model-parallel-size {pp} does not divide --num-layers {args.num_layers}; say how layers are"
            " split (--decoder-last-pipeline-num-layers), or use a divisor"
        )
    if args.allgather_cp and cp > 1:
        yield _error(f"--allgather-cp with --context-parallel-size {cp} is for sparse-attention models only; drop it")
    longest = longest_sequence(args)
    if args.max_tokens_per_gpu and longest and args.max_tokens_per_gpu * cp < longest:
        yield _warning(
            f"--max-tokens-per-gpu {args.max_tokens_per_gpu} × --context-parallel-size {cp} holds less than the longest"
            f" sequence of {longest} tokens, which then takes more memory than planned; use {-(-longest // cp)}"
        )
    engines = args.rollout_num_gpus if args.rollout_num_gpus is not None else world if args.colocate else None
    if engines and engines % args.rollout_num_gpus_per_engine:
        yield _error(
            f"--rollout-num-gpus-per-engine {args.rollout_num_gpus_per_engine} does not divide the {engines} rollout"
            " GPUs; use a divisor"
        )
    if args.spec and any("qwen3_5" in part for part in args.spec) and not args.no_rope_fusion:
        yield _warning("Qwen3.5 rotates a part of each head only, which fused RoPE does not do; add --no-rope-fusion")


def _reward(command: Command, config: FipoConfig | None) -> Iterator[Finding]:
    args = command.args
    buffer, longest = args.overlong_buffer_len, args.rollout_max_response_len
    if shaped(args) or args.rm_type == "dapo":
        source = "dapo_math_reward" if shaped(args) else "--rm-type dapo"
        if args.reward_key is None:
            yield _error(f"{source} returns a dictionary, and --reward-key is missing; add --reward-key score")
        elif args.reward_key not in ("score", "acc"):
            yield _error(f"--reward-key {args.reward_key} is not in what {source} returns; use --reward-key score")
        elif args.reward_key == "acc" and shaped(args):
            yield _warning("--reward-key acc trains without the overlong penalty; use --reward-key score")
        if (args.eval_reward_key or args.reward_key) not in (None, "acc") and (
            args.eval_prompt_data or args.eval_config
        ):
            yield _warning("evaluation reports the shaped score instead of accuracy; add --eval-reward-key acc")
    if buffer is not None and not shaped(args):
        yield _error(f"--overlong-buffer-len has no effect with this reward; add --custom-rm-path {OUR_REWARD}")
    if buffer is not None and longest is not None and not 0 <= buffer < longest:
        yield _error(
            f"--overlong-buffer-len {buffer} does not lie below --rollout-max-response-len {longest}, so that every"
            f" response would be penalized; use {longest // 5}"
        )
    if args.overlong_penalty_factor is not None and args.overlong_penalty_factor < 0:
        yield _error(
            f"--overlong-penalty-factor {args.overlong_penalty_factor:g} would reward length; it is subtracted: use 1.0"
        )
    if shaped(args) and buffer is None:
        yield _warning("--overlong-buffer-len is missing, so that there is no overlong penalty; add it")
    filter_path = args.dynamic_sampling_filter_path or ""
    if shaped(args) and "check_reward_nonzero_std" in filter_path:
        yield _warning(
            f"--dynamic-sampling-filter-path {filter_path} looks at the shaped score and keeps groups that differ in"
            f" length alone; use {OUR_FILTER}"
        )
    if filter_path == OUR_FILTER and args.custom_rm_path is None and args.rm_type != "dapo":
        yield _error(
            f"--dynamic-sampling-filter-path {OUR_FILTER} reads 'acc', which this reward does not return; add"
            f" --custom-rm-path {OUR_REWARD}"
        )
    if args.custom_rm_path is None and args.rm_type is None and not args.debug_train_only:
        yield _error(f"no reward: add --custom-rm-path {OUR_REWARD} (or --rm-type)")


def _old_log_probs(command: Command, config: FipoConfig | None) -> Iterator[Finding]:
    args = command.args
    if args.use_rollout_logprobs and args.use_tis:
        yield _error(
            "--use-tis corrects Megatron's log-probs towards SGLang's, and --use-rollout-logprobs uses SGLang's as they"
            " are; drop one of them"
        )
    if args.get_mismatch_metrics and args.custom_tis_function_path is None:
        yield _error(
            "--get-mismatch-metrics needs --custom-tis-function-path slime_fipo.plugin.loss.mismatch_metrics_function"
        )
    if args.custom_tis_function_path and not (args.use_tis or args.get_mismatch_metrics):
        yield _warning("--custom-tis-function-path has no effect without --use-tis or --get-mismatch-metrics; drop it")
    if args.fipo_shift_from == "train" and not args.use_rollout_logprobs:
        yield _warning(
            "--fipo-shift-from train changes nothing without --use-rollout-logprobs: the ratio is Megatron's already;"
            " drop it or add --use-rollout-logprobs"
        )


def _objective(command: Command, config: FipoConfig | None) -> Iterator[Finding]:
    args = command.args
    if args.loss_type not in ("fipo_loss", "policy_loss"):
        return
    if args.eps_clip_high is None or args.eps_clip_high == args.eps_clip:
        yield _warning(
            f"--eps-clip-high is --eps-clip {args.eps_clip:g}; the recipe clips higher: add --eps-clip-high 0.28"
        )
    if not args.calculate_per_token_loss:
        yield _warning("the loss is a mean over responses; the recipe's is over tokens: add --calculate-per-token-loss")
    given = [name for name, value in vars(args).items() if name.startswith("fipo_") and value is not None]
    if args.loss_type == "policy_loss" and given:
        yield _error(
            f"--{given[0].replace('_', '-')} has no effect with --loss-type policy_loss; use fipo_loss or drop it"
        )
    size = billions_of_parameters(args)
    if config is None or size is None:
        return
    low, high = config.influence_bounds
    if size < SMALL:
        if config.safety_thresh is None or config.safety_thresh > 4:
            threshold = "none" if config.safety_thresh is None else f"{config.safety_thresh:g}"
            yield _warning(
                f"--fipo-safety-thresh {threshold} is the 32B model's; a model of {size:.1f}B wants"
                " --fipo-safety-thresh 3"
            )
        if low >= 1.0:
            yield _warning(
                f"--fipo-clip-high-only (weights in [{low:g}, {high:g}]) is the 32B model's; a model of"
                f" {size:.1f}B wants --fipo-preset 7b, weights in [0.8, 1.2]"
            )
    if size > LARGE:
        if config.safety_thresh is not None and config.safety_thresh < 10:
            yield _warning(
                f"--fipo-safety-thresh {config.safety_thresh:g} is the 7B model's; a model of {size:.1f}B wants"
                " --fipo-safety-thresh 10"
            )
        if low < 1.0:
            yield _warning(
                f"weights in [{low:g}, {high:g}] are the 7B model's; a model of {size:.1f}B wants --fipo-preset 32b,"
                " weights in [1.0, 1.2]"
            )


def _checkpoints(command: Command, config: FipoConfig | None) -> Iterator[Finding]:
    args = command.args
    if args.save_interval is not None and args.save is None:
        yield _error("--save-interval needs --save; add it")
    if args.save is None:
        yield _warning("--save is missing: nothing is kept, and an interrupted run starts anew; add --save and --load")
    elif args.load != args.save:
        yield _warning(
            f"--load {args.load} is not --save {args.save}: the same command again would not continue the run; give"
            " both the same folder"
        )
    loads = args.load is not None and ((Path(args.load) / "latest_checkpointed_iteration.txt").is_file())
    load_is_hf = args.load is not None and (Path(args.load) / "config.json").is_file()
    if not loads and not load_is_hf:
        if args.load and Path(args.load).is_dir() and any(Path(args.load).iterdir()):
            yield _warning(
                f"--load {args.load} holds no checkpoint (latest_checkpointed_iteration.txt), so slime starts from"
                " --ref-load without saying so; check the path"
            )
        if args.ref_load is None:
            yield _error("--ref-load is missing, and --load holds no checkpoint to start from; add --ref-load")
        elif not (Path(args.ref_load) / "latest_checkpointed_iteration.txt").is_file():
            yield _error(
                f"--ref-load {args.ref_load} is no Megatron checkpoint (latest_checkpointed_iteration.txt is missing);"
                " convert the model with slime's tools/convert_hf_to_torch_dist.py"
            )
    if args.hf_checkpoint is None:
        yield _error("--hf-checkpoint is missing; SGLang and the tokenizer need it")
        return
    file = Path(args.hf_checkpoint) / "config.json"
    try:
        declared = json.loads(file.read_text(encoding="utf-8"))
        declared = declared.get("text_config", declared)
        positions = declared.get("max_position_embeddings")
    except (OSError, ValueError, AttributeError):
        yield _error(f"--hf-checkpoint {args.hf_checkpoint} has no readable config.json; download the model there")
        return
    yield from _same_model(args, declared)
    for flag, longest in (
        ("--rollout-max-response-len", longest_sequence(args)),
        (
            "--eval-max-response-len",
            args.eval_max_response_len
            and args.eval_max_response_len + (args.eval_max_prompt_len or args.rollout_max_prompt_len or 0),
        ),
    ):
        if isinstance(positions, int) and longest and longest > positions:
            yield _error(
                f"prompt and {flag} make up to {longest} tokens, and {file} declares {positions} positions;"
                " shorten them or extend it:"
                f" python3 -m slime_fipo.recipes.extend_context {args.hf_checkpoint} NEW --positions N"
            )
            break


def _same_model(args: argparse.Namespace, declared: dict) -> Iterator[Finding]:
    rope = declared.get("rope_parameters")
    rope_base = rope.get("rope_theta") if isinstance(rope, dict) else None
    pairs = {
        "num-layers": (args.num_layers, declared.get("num_hidden_layers")),
        "hidden-size": (args.hidden_size, declared.get("hidden_size")),
        "ffn-hidden-size": (args.ffn_hidden_size, declared.get("intermediate_size")),
        "num-attention-heads": (args.num_attention_heads, declared.get("num_attention_heads")),
        "num-query-groups": (args.num_query_groups, declared.get("num_key_value_heads")),
        "rotary-base": (args.rotary_base, rope_base or declared.get("rope_theta")),
        "norm-epsilon": (args.norm_epsilon, declared.get("rms_norm_eps")),
    }
    for flag, (given, wanted) in pairs.items():
        if given is not None and wanted is not None and given != wanted:
            yield _error(
                f"--{flag} {given:g} is not the {wanted:g} of --hf-checkpoint {args.hf_checkpoint}; source that model's"
                " script from scripts/models"
            )
    tied = declared.get("tie_word_embeddings")
    if tied is not None and tied == args.untie_embeddings_and_output_weights:
        change = "drop" if tied else "add"
        yield _error(
            f"--hf-checkpoint {args.hf_checkpoint} has {'tied' if tied else 'untied'} embeddings; {change}"
            " --untie-embeddings-and-output-weights"
        )


def _data(command: Command, config: FipoConfig | None) -> Iterator[Finding]:
    args = command.args
    if args.prompt_data is None:
        if not args.debug_train_only:
            yield _error("--prompt-data is missing; add it")
    else:
        yield from _data_file(args, "--prompt-data", args.prompt_data, "--input-key", args.input_key, args.label_key)
    if args.eval_interval is not None and not args.eval_prompt_data and not args.eval_config:
        yield _error("--eval-interval needs --eval-prompt-data NAME PATH; add it")
    names = list(args.eval_prompt_data or [])
    if len(names) > 1 and len(names) % 2:
        yield _error("--eval-prompt-data wants pairs of a name and a path; one of them is missing its other half")
        return
    for path in names[1::2] or names:
        input_key = args.eval_input_key or args.input_key
        label_key = args.eval_label_key or args.label_key
        yield from _data_file(args, "--eval-prompt-data", path, "--eval-input-key", input_key, label_key)


def _data_file(args, flag: str, path: str, key_flag: str, input_key: str, label_key: str | None) -> Iterator[Finding]:
    path = re.sub(r"@\[-?\d*:-?\d*\]$", "", path)
    if not Path(path).is_file():
        yield _error(f"{flag} {path} does not exist; check the path")
        return
    if not path.endswith((".jsonl", ".parquet")):
        yield _error(f"{flag} {path} is neither .jsonl nor .parquet, which is all that slime reads; convert it")
        return
    if label_key is None:
        yield _error("--label-key is missing, so that no answer can be checked; add --label-key label")
    if path.endswith(".parquet"):
        return
    try:
        with open(path, encoding="utf-8") as file:
            rows = [json.loads(line) for line in islice(filter(str.strip, file), ROWS_READ)]
    except ValueError:
        yield _error(f"{flag} {path} holds lines that are no JSON, and slime drops those; mend the file")
        return
    if not rows or not all(isinstance(row, dict) for row in rows):
        yield _error(f"{flag} {path} holds no JSON objects, one per line; mend the file")
        return
    for name, key in ((key_flag, input_key), (key_flag.replace("input", "label"), label_key)):
        if key is not None and not all(key in row for row in rows):
            yield _error(
                f"{name} {key} is not in every row of {path} (it has {', '.join(sorted(rows[0]))}); name its key"
            )
            return
    if label_key is not None and (shaped(args) or args.rm_type == "dapo"):
        wrong = next((row[label_key] for row in rows if not _is_integer(row[label_key])), None)
        if wrong is not None:
            yield _error(
                f"{flag} {path} has the label {wrong!r}, and DAPO's verifier compares integers; use other data or"
                " another --custom-rm-path"
            )


def _is_integer(label) -> bool:
    try:
        return float(label) == int(float(label))
    except (TypeError, ValueError, OverflowError):
        return False


RULES: tuple[Callable[[Command, FipoConfig | None], Iterator[Finding]], ...] = (
    _launcher,
    _batches,
    _objective,
    _old_log_probs,
    _reward,
    _parallelism,
    _checkpoints,
    _data,
)


def check_command(command: Command) -> tuple[list[Finding], FipoConfig | None]:
    """All findings, errors first, and FIPO's effective settings where the run has them and they are valid."""
    findings, config = [], None
    args = copy.copy(command.args)
    args.global_batch_size = global_batch_size(args)
    if args.loss_type == "fipo_loss":
        try:
            config = translate(args)
        except ValueError as error:
            findings.append(_error(str(error)))
    for rule in RULES:
        findings.extend(rule(command, config))
    return sorted(findings, key=lambda f: f.severity), config


# -- the effective recipe --

_PAPER_COMMON = {
    "half-life of Future-KL": "32 tokens",
    "dual clip": "10",
    "PPO clip": "0.2 / 0.28",
    "loss": "token-level mean",
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
_FIPO_ROWS = ("half-life of Future-KL", "influence weights", "safety threshold", "shift measured from")


def effective_recipe(command: Command, config: FipoConfig | None) -> tuple[str, list[tuple[str, str, str]]]:
    """Heading of the paper's column, and rows of (setting, this command's, the paper's)."""
    args = command.args
    size = billions_of_parameters(args)
    paper_size = "32B" if size is not None and size > LARGE else "7B"
    batch, steps = global_batch_size(args), steps_per_rollout(args)
    rows = {
        "model": "?" if size is None else f"about {size:.1f}B",
        "prompts × samples per rollout": f"{args.rollout_batch_size} × {args.n_samples_per_prompt}",
        "optimizer steps per rollout": "?" if steps is None else str(steps),
        "samples per step": "?" if batch is None else str(batch),
        "tokens per step, at most": (
            f"{batch * args.rollout_max_response_len:,}" if batch and args.rollout_max_response_len else "?"
        ),
        "prompt / response / overlong buffer": " / ".join(
            "none" if n is None else str(n)
            for n in (args.rollout_max_prompt_len, args.rollout_max_response_len, args.overlong_buffer_len)
        ),
        "PPO clip": f"{args.eps_clip:g} / {args.eps_clip if args.eps_clip_high is None else args.eps_clip_high:g}",
        "loss": "token-level mean" if args.calculate_per_token_loss else "mean over responses",
        "dual clip": "none" if args.eps_clip_c is None else f"{args.eps_clip_c:g}",
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
    paper = {"model": paper_size, **_PAPER.get((args.loss_type, paper_size), {})}
    name = {"fipo_loss": "FIPO", "policy_loss": "DAPO baseline"}.get(args.loss_type, args.loss_type)
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
    except CommandError as error:
        console.print(f"error: {error}", markup=False, soft_wrap=True)
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
