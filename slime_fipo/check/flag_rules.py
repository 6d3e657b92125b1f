"""Rules of ``slime-fipo check`` that look at the command's flags alone: launcher, batches, loss, rewards, parallelism.

Each rule is a generator over the parsed command and FIPO's settings (None without FIPO). Rules that read files live in
``file_rules.py``.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from ..algorithm import FipoConfig
from .command import Command
from .derived import (
    LARGE,
    OUR_EVAL_LOG,
    OUR_FILTER,
    OUR_REWARD,
    SMALL,
    billions_of_parameters,
    data_parallel_size,
    decay_steps,
    global_batch_size,
    is_dapo,
    lacks_accuracy,
    longest_sequence,
    nearest_batch,
    objective,
    samples_per_rollout,
    shaped,
)
from .finding import Finding, error, warning

# Flags of the package that are not in a slime with FIPO built in, where there is one implementation.
_NOT_BUILT_IN = ("--fipo-impl", "--fipo-chunk-size")

DEFAULT_ROLLOUT = "slime.rollout.sglang_rollout.generate_rollout"
TRAIN_ONLY_ROLLOUTS = (
    "slime.rollout.fully_async_rollout.generate_rollout_fully_async",
    "slime.rollout.sft_rollout.generate_rollout",
)


def launcher(command: Command, config: FipoConfig | None) -> Iterator[Finding]:
    args, script = command.args, command.script
    for message in (*command.errors, *command.misspelt_own):
        yield error(message)
    for flag, close in command.misspelt:
        yield error(f"{flag} is no flag that slime knows, and slime ignores such flags silently; did you mean {close}?")
    for flag, replacement in command.foreign:
        yield error(f"{flag} is another framework's flag, and slime ignores it silently; use {replacement}")
    found = script is not None and Path(script).is_file()
    built_in = found and (Path(script).parent / "slime" / "utils" / "fipo.py").is_file()
    if command.launcher:
        if built_in:
            yield error(
                f"FIPO is built into the slime of {script}, and python3 -m slime_fipo refuses to run there; run python3"
                f" {script} …, or take it out: slime-fipo patch revert --slime-root {Path(script).parent}"
            )
    elif built_in:
        for flag in command.own_flags:
            if flag in _NOT_BUILT_IN:
                yield error(f"{flag} is not in a slime with FIPO built in, which ignores it silently; drop it")
    elif args.loss_type == "fipo_loss":
        unless = "" if found else ", unless FIPO is built into that slime (slime-fipo patch apply --slime-root PATH)"
        yield error(
            f"--loss-type fipo_loss is unknown to {script} without the launcher{unless}; run python3 -m slime_fipo"
            f" {script} …"
        )
    overlong = [flag for flag in command.own_flags if flag.startswith("--overlong-")]
    if overlong and not command.launcher:
        names = " and ".join(flag[2:].replace("-", "_") for flag in overlong)
        run = "" if built_in else f"run python3 -m slime_fipo {script} …, or "
        yield error(
            f"{overlong[0]} is ignored by {script} without the launcher; {run}set {names} in the YAML of"
            " --custom-config-path"
        )


def asynchrony(command: Command, config: FipoConfig | None) -> Iterator[Finding]:
    args = command.args
    is_async = (command.script or "").endswith("train_async.py")
    if is_async and args.colocate:
        yield error(
            "--colocate shares the GPUs between training and rollouts, which train_async.py runs at once; drop it and"
            " add --rollout-num-gpus, or use train.py"
        )
    stale = is_async or "fully_async" in (args.rollout_function_path or "")
    if stale and not args.use_rollout_logprobs and not args.use_tis:
        yield warning(
            "asynchronous rollouts come from older weights, but Megatron's recomputed log-probs do not show that: add"
            " --use-rollout-logprobs (or --use-tis)"
        )


def hooks(command: Command, config: FipoConfig | None) -> Iterator[Finding]:
    """Import paths into this package that lead nowhere."""
    named = {f"--{name.replace('_', '-')}": value for name, value in vars(command.args).items()}
    named |= {
        f"custom_rm_path of {dataset.name} in {dataset.source}": dataset.custom_rm_path
        for dataset in command.eval_datasets
    }
    for flag, path in named.items():
        if isinstance(path, str) and path.startswith("slime_fipo.") and not _is_defined(path):
            yield error(f"{flag} {path} does not exist; check the spelling")


def _is_defined(path: str) -> bool:
    """Whether a module of this package defines that name; the module, which may need slime, is not imported."""
    module, _, name = path.rpartition(".")
    try:
        spec = importlib.util.find_spec(module)
    except (ModuleNotFoundError, ValueError):
        return False
    if spec is None or spec.origin is None:
        return False
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    return any(getattr(node, "name", None) == name for node in tree.body)


def batches(command: Command, config: FipoConfig | None) -> Iterator[Finding]:
    args = command.args
    samples, steps = samples_per_rollout(args), args.num_steps_per_rollout
    if samples is None:
        yield error("--rollout-batch-size is missing; slime requires it")
        return
    if steps and steps > samples:
        yield error(
            f"--num-steps-per-rollout {steps} is more than a rollout's {samples} samples; use {min(8, samples)}"
        )
        return
    batch = global_batch_size(args)
    if batch is None:
        yield error("--global-batch-size is missing; add it or --num-steps-per-rollout 8")
        return
    name = f"--global-batch-size {batch}"
    fix = "use other sizes: --rollout-batch-size, --n-samples-per-prompt"
    if (better := nearest_batch(args, batch)) is not None:
        fix = f"use {better}"
        if args.global_batch_size is None:
            name, fix = f"{name} (--num-steps-per-rollout {steps})", f"use --num-steps-per-rollout {samples // better}"
    if steps and samples // steps != batch:
        yield error(
            f"--global-batch-size {batch} is not the {samples} samples of a rollout over --num-steps-per-rollout"
            f" {steps}; drop one of the two"
        )
    elif batch > samples:
        yield error(f"{name} is more than a rollout's {samples} samples; {fix}")
    elif samples % batch:
        yield error(
            f"{name} does not divide a rollout's {samples} samples: {samples % batch} of them are generated and never"
            f" trained on; {fix}"
        )
    ranks = data_parallel_size(args)
    if ranks and batch % (ranks * args.micro_batch_size):
        yield error(
            f"{name} does not divide over {ranks} data-parallel ranks × --micro-batch-size {args.micro_batch_size};"
            f" {fix}"
        )
    if args.n_samples_per_prompt == 1 and args.advantage_estimator == "grpo":
        yield error("--n-samples-per-prompt 1 leaves GRPO no group to compare with: every advantage is 0; use 16")
    if args.over_sampling_batch_size is not None and args.over_sampling_batch_size < args.rollout_batch_size:
        yield error(
            f"--over-sampling-batch-size {args.over_sampling_batch_size} is below --rollout-batch-size"
            f" {args.rollout_batch_size}; make it at least that"
        )
    if args.num_rollout is None and args.num_epoch is None:
        yield error("--num-rollout is missing; add it or --num-epoch")
    if args.use_dynamic_batch_size and args.max_tokens_per_gpu is None:
        yield error("--use-dynamic-batch-size needs --max-tokens-per-gpu; add it")
    if args.rollout_temperature <= 0:
        yield error(f"--rollout-temperature {args.rollout_temperature:g} is no policy to train; use 1.0")
    whole = decay_steps(args)
    if whole and args.lr_warmup_iters >= whole:
        yield error(
            f"--lr-warmup-iters {args.lr_warmup_iters} is not below the run's {whole} optimizer steps, which Megatron"
            f" refuses; use {whole // 2} or a larger --num-rollout"
        )


def lengths(command: Command, config: FipoConfig | None) -> Iterator[Finding]:
    args = command.args
    context, prompt = args.rollout_max_context_len, args.rollout_max_prompt_len
    if context is not None and prompt is not None and prompt >= context:
        yield error(
            f"--rollout-max-context-len {context} leaves no token for a response behind --rollout-max-prompt-len"
            f" {prompt}, which slime refuses; it is prompt and response together: use more than {prompt}"
        )


def parallelism(command: Command, config: FipoConfig | None) -> Iterator[Finding]:
    args = command.args
    world = args.actor_num_nodes * args.actor_num_gpus_per_node
    tp, pp, cp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.context_parallel_size
    if data_parallel_size(args) is None:
        flags = (
            f"--tensor-model-parallel-size {tp} × --pipeline-model-parallel-size {pp} × --context-parallel-size {cp}"
        )
        yield error(f"{flags} = {tp * pp * cp} does not divide the {world} GPUs of the actor; change one of them")
    for name in ("num_attention_heads", "num_query_groups"):
        heads = getattr(args, name)
        if heads and heads % tp:
            yield error(
                f"--tensor-model-parallel-size {tp} does not divide --{name.replace('_', '-')} {heads}; use a divisor"
            )
    split = (
        args.decoder_first_pipeline_num_layers
        or args.decoder_last_pipeline_num_layers
        or args.pipeline_model_parallel_layout
    )
    if args.num_layers and args.num_layers % pp and not split:
        yield warning(
            f"--pipeline-model-parallel-size {pp} does not divide --num-layers {args.num_layers}; say how layers are"
            " split (--decoder-last-pipeline-num-layers), or use a divisor"
        )
    longest = longest_sequence(args)
    if args.max_tokens_per_gpu and longest and args.max_tokens_per_gpu * cp < longest:
        yield warning(
            f"--max-tokens-per-gpu {args.max_tokens_per_gpu} × --context-parallel-size {cp} holds less than the longest"
            f" sequence of {longest} tokens, which then takes more memory than planned; use {-(-longest // cp)}"
        )
    elsewhere = args.debug_train_only or args.rollout_external or args.rollout_external_engine_addrs
    if args.rollout_num_gpus is None and not args.colocate and not elsewhere:
        yield error("no GPUs for rollouts: add --colocate to share the actor's, or --rollout-num-gpus")
    engines = args.rollout_num_gpus if args.rollout_num_gpus is not None else world if args.colocate else None
    if engines and engines % args.rollout_num_gpus_per_engine:
        yield error(
            f"--rollout-num-gpus-per-engine {args.rollout_num_gpus_per_engine} does not divide the {engines} rollout"
            " GPUs; use a divisor"
        )
    if args.spec and any("qwen3_5" in part for part in args.spec) and not args.no_rope_fusion:
        yield warning("Qwen3.5 rotates a part of each head only, which fused RoPE does not do; add --no-rope-fusion")


def reward(command: Command, config: FipoConfig | None) -> Iterator[Finding]:
    args = command.args
    buffer, longest = args.overlong_buffer_len, args.rollout_max_response_len
    if shaped(args) or (args.custom_rm_path is None and is_dapo(args.rm_type)):
        source = "dapo_math_reward" if shaped(args) else f"--rm-type {args.rm_type}"
        if args.reward_key is None:
            yield error(f"{source} returns a dictionary, and --reward-key is missing; add --reward-key score")
        elif args.reward_key not in ("score", "acc"):
            yield error(f"--reward-key {args.reward_key} is not in what {source} returns; use --reward-key score")
        elif args.reward_key == "acc" and shaped(args):
            yield warning("--reward-key acc trains without the overlong penalty; use --reward-key score")
        if (args.eval_reward_key or args.reward_key) not in (None, "acc") and command.eval_datasets:
            yield warning("evaluation reports the shaped score instead of accuracy; add --eval-reward-key acc")
    if buffer is not None and not shaped(args):
        yield error(f"--overlong-buffer-len has no effect with this reward; add --custom-rm-path {OUR_REWARD}")
    if buffer is not None and longest is not None and not 0 <= buffer < longest:
        yield error(
            f"--overlong-buffer-len {buffer} does not lie below --rollout-max-response-len {longest}, so that every"
            f" response would be penalized; use {longest // 5}"
        )
    if args.overlong_penalty_factor is not None and args.overlong_penalty_factor < 0:
        yield error(
            f"--overlong-penalty-factor {args.overlong_penalty_factor:g} would reward length; it is subtracted: use 1.0"
        )
    if shaped(args) and buffer is None:
        yield warning("--overlong-buffer-len is missing, so that there is no overlong penalty; add it")
    filter_path = args.dynamic_sampling_filter_path or ""
    if shaped(args) and "check_reward_nonzero_std" in filter_path:
        yield warning(
            f"--dynamic-sampling-filter-path {filter_path} looks at the shaped score and keeps groups that differ in"
            f" length alone; use {OUR_FILTER}"
        )
    if filter_path == OUR_FILTER and args.custom_rm_path is None and lacks_accuracy(args.rm_type):
        yield error(
            f"--dynamic-sampling-filter-path {OUR_FILTER} reads 'acc', which this reward does not return; add"
            f" --custom-rm-path {OUR_REWARD}"
        )
    if args.custom_rm_path is None and args.rm_type is None and not args.debug_train_only:
        yield error(f"no reward: add --custom-rm-path {OUR_REWARD} (or --rm-type)")


def evaluation(command: Command, config: FipoConfig | None) -> Iterator[Finding]:
    args = command.args
    if args.eval_interval is not None and not command.eval_datasets and not command.errors:
        yield error("--eval-interval needs --eval-prompt-data NAME PATH; add it")
    ours = args.custom_eval_rollout_log_function_path == OUR_EVAL_LOG
    without_accuracy = []
    for dataset in command.eval_datasets:
        path = dataset.custom_rm_path or args.custom_rm_path
        if dataset.rm_type is not None and path is not None:
            yield warning(
                f"rm_type {dataset.rm_type} of {dataset.name} in {dataset.source} has no effect, as slime calls {path}"
                f" first; give {dataset.name} a custom_rm_path"
            )
        if path is None and lacks_accuracy(dataset.rm_type or args.rm_type):
            without_accuracy.append(dataset.name)
        elif ours and dataset.custom_rm_path not in (None, OUR_REWARD):
            yield warning(
                f"--custom-eval-rollout-log-function-path {OUR_EVAL_LOG} leaves {dataset.name} out unless"
                f" {dataset.custom_rm_path} returns 'acc'; let it, or use {OUR_REWARD}"
            )
    if ours and without_accuracy:
        yield error(
            f"--custom-eval-rollout-log-function-path {OUR_EVAL_LOG} reads 'acc', which the reward of"
            f" {', '.join(without_accuracy)} does not return; use --custom-rm-path {OUR_REWARD}, or drop it"
        )


def evaluation_function(command: Command, config: FipoConfig | None) -> Iterator[Finding]:
    """Whether what evaluates can: with a rollout function of slime's that only trains, or a reward of whole groups."""
    args = command.args
    if args.eval_interval is None or args.debug_train_only:
        return
    given = args.eval_function_path or args.rollout_function_path
    flag = "--eval-function-path" if args.eval_function_path else "--rollout-function-path"
    if given in TRAIN_ONLY_ROLLOUTS:
        yield error(
            f"{flag} {given} cannot evaluate, and raises at the first evaluation; drop --eval-interval and evaluate the"
            " checkpoints in a run of their own (--num-rollout 0)"
        )
    if args.group_rm and given in (None, DEFAULT_ROLLOUT):
        yield error(
            "--group-rm scores whole groups, and slime's evaluation asserts that it is off; drop --eval-interval, or"
            " use a reward of single responses without --group-rm"
        )


def old_log_probs(command: Command, config: FipoConfig | None) -> Iterator[Finding]:
    args = command.args
    if args.use_rollout_logprobs and args.use_tis:
        yield error(
            "--use-tis corrects Megatron's log-probs towards SGLang's, and --use-rollout-logprobs uses SGLang's as they"
            " are; drop one of them"
        )
    if args.get_mismatch_metrics and args.custom_tis_function_path is None:
        yield error(
            "--get-mismatch-metrics needs --custom-tis-function-path slime_fipo.plugin.loss.mismatch_metrics_function"
        )
    if args.custom_tis_function_path and not (args.use_tis or args.get_mismatch_metrics):
        yield warning("--custom-tis-function-path has no effect without --use-tis or --get-mismatch-metrics; drop it")
    if args.fipo_shift_from == "train" and not args.use_rollout_logprobs:
        yield warning(
            "--fipo-shift-from train changes nothing without --use-rollout-logprobs: the ratio is Megatron's already;"
            " drop it or add --use-rollout-logprobs"
        )


def loss(command: Command, config: FipoConfig | None) -> Iterator[Finding]:
    args, kind = command.args, objective(command.args)
    if args.kl_coef != 0 and args.kl_loss_coef != 0:
        yield error(
            f"--kl-coef {args.kl_coef:g} and --kl-loss-coef {args.kl_loss_coef:g} exclude each other; drop one of them"
        )
    if args.advantage_estimator.startswith("reinforce_plus_plus") and not args.normalize_advantages:
        yield error(f"--advantage-estimator {args.advantage_estimator} needs --normalize-advantages; add it")
    on_command_line = [flag for flag in command.own_flags if "fipo-" in flag]
    in_file = [name for name, value in vars(args).items() if name.startswith("fipo_") and value is not None]
    if on_command_line and args.loss_type != "fipo_loss":
        by_path = f", or set {in_file[0]} in the YAML of --custom-config-path" if kind == "fipo_loss" else ""
        yield error(
            f"{on_command_line[0]} has no effect with --loss-type {args.loss_type}; use fipo_loss or drop it{by_path}"
        )
    elif in_file and kind != "fipo_loss":
        yield error(
            f"{in_file[0]} in --custom-config-path {args.custom_config_path} has no effect with --loss-type {kind};"
            " use fipo_loss or drop it"
        )
    if kind not in ("fipo_loss", "policy_loss"):
        return
    if args.eps_clip_high is None or args.eps_clip_high == args.eps_clip:
        yield warning(
            f"--eps-clip-high is --eps-clip {args.eps_clip:g}; the recipe clips higher: add --eps-clip-high 0.28"
        )
    if not args.calculate_per_token_loss:
        yield warning("the loss is a mean over responses; the recipe's is over tokens: add --calculate-per-token-loss")


def model_size(command: Command, config: FipoConfig | None) -> Iterator[Finding]:
    """FIPO's settings against the paper's two sizes, both of dense models; nothing is known of experts."""
    size = billions_of_parameters(command.args)
    if config is None or size is None or command.args.num_experts is not None:
        return
    low, high = config.influence_bounds
    if size < SMALL:
        if config.safety_thresh is None or config.safety_thresh > 4:
            threshold = "none" if config.safety_thresh is None else f"{config.safety_thresh:g}"
            yield warning(
                f"--fipo-safety-thresh {threshold} is the 32B model's; a model of {size:.1f}B wants"
                " --fipo-safety-thresh 3"
            )
        if low >= 1.0:
            yield warning(
                f"--fipo-clip-high-only (weights in [{low:g}, {high:g}]) is the 32B model's; a model of"
                f" {size:.1f}B wants --fipo-preset 7b, weights in [0.8, 1.2]"
            )
    if size > LARGE:
        if config.safety_thresh is not None and config.safety_thresh < 10:
            yield warning(
                f"--fipo-safety-thresh {config.safety_thresh:g} is the 7B model's; a model of {size:.1f}B wants"
                " --fipo-safety-thresh 10"
            )
        if low < 1.0:
            yield warning(
                f"weights in [{low:g}, {high:g}] are the 7B model's; a model of {size:.1f}B wants --fipo-preset 32b,"
                " weights in [1.0, 1.2]"
            )


FLAG_RULES = (
    launcher,
    asynchrony,
    hooks,
    batches,
    loss,
    model_size,
    old_log_probs,
    reward,
    evaluation,
    evaluation_function,
    lengths,
    parallelism,
)
