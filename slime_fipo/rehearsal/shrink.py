"""A user's train command made small enough for a CPU: what is changed, to what, and why; everything else stays.

The YAML files that a command names are copied without the values that would win over the rehearsal's flags. The model
itself is shrunk in ``small_model.py``.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..check.command import Command
from ..check.derived import data_parallel_size, objective, samples_per_rollout, steps_per_rollout
from ..check.file_rules import sliced_path
from ..errors import UserError
from ..plugin.config_files import ROLE_CONFIG, read_mapping
from .flags import MEGATRON_FLAGS, SGLANG_FLAGS
from .small_model import SmallModel

NUM_ROLLOUT = 3
MOST_RANKS = 2  # of each kind of parallelism
MOST_PROMPTS, MOST_SAMPLES, MOST_STEPS = 4, 4, 2
RESPONSE_LEN = 24
MAX_TOKENS = 256  # of a micro-batch: logits over a real vocabulary are most of what a rank takes
DATA_ROWS, EVAL_ROWS = 512, 2
LEARNING_RATE = 1e-3  # at a user's 1e-6 three rollouts would not move bfloat16 weights

# Flags that are left out, by what is said of them in the table.
_LEFT_OUT = {
    "the engine's memory and the trainer's are one: no sharing in turns": (
        *("--colocate", "--offload", "--offload-train", "--offload-rollout", "--release-train"),
    ),
    "saves a GPU's memory": (
        *("--recompute-granularity", "--recompute-method", "--recompute-num-layers", "--recompute-modules"),
        *("--recompute-loss-function", "--optimizer-cpu-offload", "--optimizer-offload-fraction"),
        *("--overlap-cpu-optimizer-d2h-h2d", "--use-precision-aware-optimizer", "--main-params-dtype"),
        *("--main-grads-dtype", "--exp-avg-dtype", "--exp-avg-sq-dtype"),
    ),
    "CUDA streams": (
        *("--overlap-grad-reduce", "--overlap-param-gather", "--tp-comm-overlap", "--overlap-p2p-communication"),
        *("--cuda-graph-impl", "--cuda-graph-scope", "--enable-cuda-graph", "--external-cuda-graph", "--async-save"),
    ),
    "kernels for GPUs": (
        *("--fp8-format", "--fp8-recipe", "--fp8-param-gather", "--fp8-amax-history-len", "--fp8-amax-compute-algo"),
        *("--fp4-format", "--batch-invariant-mode", "--qwen-gdn-backend"),
    ),
    "one pipeline stage": (
        *("--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"),
        *("--num-layers-per-virtual-pipeline-stage", "--pipeline-model-parallel-layout"),
        *("--account-for-embedding-in-pipeline-split", "--account-for-loss-in-pipeline-split"),
    ),
    "watches for slow engines, which these are": (
        *("--use-fault-tolerance", "--rollout-health-check-interval", "--rollout-health-check-timeout"),
        "--rollout-health-check-first-wait",
    ),
    "engines of its own": ("--rollout-external", "--rollout-external-engine-addrs", "--prefill-num-servers"),
    "profiles a GPU": (
        *("--profile", "--profile-target", "--use-pytorch-profiler", "--record-memory-history"),
        *("--memory-recorder", "--memory-snapshot-dir", "--memory-snapshot-num-steps"),
    ),
    "starts from random weights": ("--start-rollout-id", "--ckpt-step", "--ref-ckpt-step", "--finetune"),
    "as many rollouts as a rehearsal has": ("--num-epoch",),
    "the rate is constant": (
        *("--lr-warmup-iters", "--lr-warmup-fraction", "--lr-warmup-samples", "--lr-warmup-init", "--min-lr"),
        *("--lr-decay-iters", "--lr-decay-samples", "--lr-wsd-decay-style", "--lr-wsd-decay-iters"),
    ),
    "offline": ("--wandb-key", "--wandb-host", "--wandb-run-id"),
    "one checkpoint, which the rehearsal deletes": ("--save-hf", "--save-debug-train-data", "--save-retain-interval"),
}
# Engine flags are SGLang's for GPUs; this one is about the texts that it gives.
_ENGINE_FLAGS_KEPT = ("--sglang-context-length",)
_REFUSED = {
    "debug_train_only": "--debug-train-only and --load-debug-rollout-data sample nothing",
    "debug_rollout_only": "--debug-rollout-only trains nothing",
}


@dataclass(frozen=True)
class Change:
    """A row of the table: what, the user's value, the rehearsal's."""

    what: str
    given: str
    rehearsed: str


@dataclass
class Shrunk:
    """The command's arguments for the rehearsal, what was changed, and the number of logical GPUs that it takes."""

    arguments: list[str]
    changes: list[Change] = field(default_factory=list)
    gpus: int = 0
    steps_per_rollout: int = 1
    own: set[str] = field(default_factory=set)  # flags that :meth:`set` was called for

    def given(self, flag: str) -> list[str] | None:
        """The last value that the command gives a flag; None where it does not have it."""
        value = None
        for i, word in enumerate(self.arguments):
            if word.partition("=")[0] == flag:
                end = self._end(i)
                value = [word.partition("=")[2]] if "=" in word else self.arguments[i + 1 : end]
        return value

    def drop(self, flag: str) -> list[str] | None:
        """Take a flag out with its values; returns :meth:`given`."""
        value = self.given(flag)
        i = 0
        while i < len(self.arguments):
            if self.arguments[i].partition("=")[0] == flag:
                del self.arguments[i : self._end(i)]
            else:
                i += 1
        return value

    def set(self, flag: str, *values: object, say: bool = True) -> None:
        """Give a flag these values in place of its own; ``say``: in the table, if they differ."""
        texts = [str(value) for value in values]
        before = self.drop(flag)
        self.own.add(flag)
        self.arguments += [flag, *texts]
        if say and before is not None and before != texts:
            self.changes.append(Change(flag, " ".join(before) or "on", " ".join(texts) or "on"))

    def _end(self, start: int) -> int:
        if "=" in self.arguments[start]:
            return start + 1
        words = range(start + 1, len(self.arguments))
        return next((i for i in words if re.match(r"--[A-Za-z]", self.arguments[i])), len(self.arguments))


def shrink(command: Command, model: SmallModel, folder: Path) -> Shrunk:
    """The command for CPUs: the first of two runs (:func:`resume` makes the second of it).

    Args:
        model: the small checkpoint.
        folder: everything that the run writes goes below it.

    Raises:
        UserError: nothing to rehearse, or parts that have no CPU; names the flag.
    """
    args = command.args
    for name, reason in _REFUSED.items():
        if getattr(args, name):
            raise UserError(f"{reason}: there is no training to rehearse; drop it")
    if args.advantage_estimator == "ppo":
        raise UserError("--advantage-estimator ppo has a critic, which a rehearsal cannot run; use grpo")
    shrunk = Shrunk(list(command.arguments))
    _model(shrunk, model)
    _ranks(shrunk, args)
    _batches(shrunk, args)
    _lengths(shrunk, args)
    _optimizer(shrunk)
    _evaluation(shrunk, command, folder)
    _files(shrunk, args, folder, model)
    _leave_out(shrunk)
    shrunk.arguments += [*MEGATRON_FLAGS, *SGLANG_FLAGS]
    _yaml_files(shrunk, folder)
    return shrunk


def resume(first: Shrunk, folder: Path) -> list[str]:
    """Arguments of the second run: one more rollout from the checkpoint of the first, on the first's last responses.

    No engine is started for it: what is tried is the trainer's checkpoint.
    """
    second = Shrunk(list(first.arguments))
    second.set("--load", folder / "checkpoint", say=False)
    second.set("--num-rollout", NUM_ROLLOUT + 1, say=False)
    second.set("--load-debug-rollout-data", _rollouts(folder, NUM_ROLLOUT - 1), say=False)
    second.set("--override-opt-param-scheduler", say=False)
    for flag in ("--save", "--save-interval", "--save-debug-rollout-data", "--dump-details", "--fipo-record"):
        second.drop(flag)
    for flag in ("--fipo-record-samples", "--fipo-record-interval", "--save-retain-interval"):
        second.drop(flag)
    for flag in ("--eval-interval", "--eval-prompt-data", "--eval-config", "--use-wandb"):
        second.drop(flag)
    return second.arguments


def _model(shrunk: Shrunk, model: SmallModel) -> None:
    shrunk.changes += [Change(*row) for row in model.rows]
    for flag in model.removed_flags:
        if shrunk.drop(flag) is not None:
            shrunk.changes.append(Change(flag, "given", "left out"))
    for flag, value in model.flags.items():
        shrunk.set(flag, value, say=False)


def _ranks(shrunk: Shrunk, args: argparse.Namespace) -> None:
    tensor, context = (min(n, MOST_RANKS) for n in (args.tensor_model_parallel_size, args.context_parallel_size))
    data = min(data_parallel_size(args) or 1, MOST_RANKS)
    ranks = tensor * context * data
    shrunk.set("--tensor-model-parallel-size", tensor)
    shrunk.set("--context-parallel-size", context)
    if args.pipeline_model_parallel_size > 1:
        shrunk.set("--pipeline-model-parallel-size", 1)
    world = args.actor_num_nodes * args.actor_num_gpus_per_node
    shrunk.changes.append(Change("trainer's ranks", f"{world} GPUs", f"{ranks} CPU (DP {data})"))
    for flag, value in (
        ("--actor-num-nodes", 1),
        ("--actor-num-gpus-per-node", ranks),
        ("--num-gpus-per-node", ranks + 1),
        ("--rollout-num-gpus", 1),
        ("--rollout-num-gpus-per-engine", 1),
    ):
        shrunk.set(flag, value, say=False)
    shrunk.gpus = ranks + 1


def _batches(shrunk: Shrunk, args: argparse.Namespace) -> None:
    samples = min(args.n_samples_per_prompt, MOST_SAMPLES)
    prompts = min(args.rollout_batch_size or MOST_PROMPTS, MOST_PROMPTS)
    steps = min(steps_per_rollout(args) or 1, MOST_STEPS)
    prompts = max(prompts, MOST_PROMPTS if steps > 1 else 1)  # a step's share has to spread over the ranks
    shrunk.set("--num-rollout", NUM_ROLLOUT)
    shrunk.set("--rollout-batch-size", prompts)
    shrunk.set("--n-samples-per-prompt", samples)
    batch = prompts * samples // steps
    if args.num_steps_per_rollout is not None:
        shrunk.set("--num-steps-per-rollout", steps)
        if args.global_batch_size is not None:
            shrunk.set("--global-batch-size", batch)
    else:
        shrunk.set("--global-batch-size", batch)
    if args.over_sampling_batch_size is not None:
        shrunk.set("--over-sampling-batch-size", 2 * prompts)
    given = f"{samples_per_rollout(args)} samples in {steps_per_rollout(args)} steps"
    shrunk.changes.append(Change("a rollout", given, f"{prompts * samples} samples in {steps} steps"))
    shrunk.steps_per_rollout = steps
    shrunk.set("--max-tokens-per-gpu", MAX_TOKENS)


def _lengths(shrunk: Shrunk, args: argparse.Namespace) -> None:
    response = min(args.rollout_max_response_len or RESPONSE_LEN, RESPONSE_LEN)
    shrunk.set("--rollout-max-response-len", response)
    if args.eval_max_response_len is not None:
        shrunk.set("--eval-max-response-len", response)
    if args.overlong_buffer_len is not None and args.rollout_max_response_len:
        share = args.overlong_buffer_len / args.rollout_max_response_len
        shrunk.set("--overlong-buffer-len", max(1, round(share * response)))


def _optimizer(shrunk: Shrunk) -> None:
    shrunk.set("--lr", LEARNING_RATE)
    shrunk.set("--lr-decay-style", "constant")


def _evaluation(shrunk: Shrunk, command: Command, folder: Path) -> None:
    args = command.args
    if args.eval_interval is None:
        return
    shrunk.set("--eval-interval", NUM_ROLLOUT)
    shrunk.set("--n-samples-per-eval-prompt", min(args.n_samples_per_eval_prompt, 2))
    if args.eval_config is not None:
        config = _shrunk_evaluation(read_mapping("--eval-config", args.eval_config))
        shrunk.set("--eval-config", _write_yaml(folder / "eval-config.yaml", config), say=False)
        shrunk.changes.append(Change("benchmarks", "all prompts", f"{EVAL_ROWS} prompts each"))
    elif args.eval_prompt_data:
        *_, last = args.eval_prompt_data
        names = args.eval_prompt_data if len(args.eval_prompt_data) > 1 else [last]
        paths = [first_rows(each, EVAL_ROWS) if i % 2 or len(names) == 1 else each for i, each in enumerate(names)]
        shrunk.set("--eval-prompt-data", *paths, say=False)
        shrunk.changes.append(Change("benchmarks", "all prompts", f"{EVAL_ROWS} prompts each"))


def first_rows(path: str, most: int) -> str:
    """slime's ``PATH@[START:END]`` for at most that many rows of what ``path`` names."""
    file, rows = sliced_path(path)
    start, stop = rows.start or 0, rows.stop
    if start < 0 or (stop is not None and stop < 0):
        return path  # from the end: how many that are is known once the file is read
    return f"{file}@[{start}:{start + most if stop is None else min(stop, start + most)}]"


def _shrunk_evaluation(config: Any) -> Any:
    """``--eval-config`` with few prompts and samples and short responses, at any depth."""
    if isinstance(config, list):
        return [_shrunk_evaluation(entry) for entry in config]
    if not isinstance(config, dict):
        return config
    small = {"n_samples_per_eval_prompt": 2, "max_response_len": RESPONSE_LEN}
    config = {
        key: min(value, small[key]) if isinstance(value, int) and key in small else _shrunk_evaluation(value)
        for key, value in config.items()
    }
    if isinstance(config.get("path"), str) and "${" not in config["path"]:
        config["path"] = first_rows(config["path"], EVAL_ROWS)
    return config


def _files(shrunk: Shrunk, args: argparse.Namespace, folder: Path, model: SmallModel) -> None:
    if args.prompt_data is not None:
        shrunk.set("--prompt-data", first_rows(args.prompt_data, DATA_ROWS), say=False)
    shrunk.set("--hf-checkpoint", model.folder, say=False)
    shrunk.set("--load", model.folder, say=False)
    if args.ref_load is not None:
        shrunk.set("--ref-load", model.folder, say=False)
    shrunk.set("--save", folder / "checkpoint", say=False)
    shrunk.set("--save-interval", NUM_ROLLOUT, say=False)
    if shrunk.given("--dump-details") is not None:
        shrunk.set("--dump-details", folder / "dump", say=False)
        shrunk.drop("--save-debug-rollout-data")
    else:
        shrunk.set("--save-debug-rollout-data", folder / "dump" / "rollout_data" / "{rollout_id}.pt", say=False)
    if shrunk.given("--fipo-record") is not None:
        shrunk.set("--fipo-record", folder / "records", say=False)
        shrunk.set("--fipo-record-interval", 1, say=False)
    if "disk" in (shrunk.given("--update-weight-transport") or ()):
        shrunk.set("--update-weight-disk-dir", folder / "weights", say=False)
    if shrunk.given("--update-weight-mode") is not None:
        shrunk.set("--update-weight-mode", "full")
    if shrunk.given("--use-wandb") is not None:
        shrunk.set("--wandb-mode", "offline")
        shrunk.set("--wandb-dir", folder / "wandb", say=False)
    if shrunk.given("--use-tensorboard") is None:
        shrunk.set("--use-tensorboard", say=False)  # what the verdict reads
        shrunk.set("--tb-project-name", "rehearsal", say=False)
        shrunk.set("--tb-experiment-name", "rehearsal", say=False)
    if objective(args) == "fipo_loss":
        shrunk.set("--fipo-log-detail", say=False)


def _rollouts(folder: Path, rollout: int) -> Path:
    return folder / "dump" / "rollout_data" / f"{rollout}.pt"


def _leave_out(shrunk: Shrunk) -> None:
    for reason, flags in _LEFT_OUT.items():
        out = [flag for flag in flags if shrunk.drop(flag) is not None]
        if out:
            shrunk.changes.append(Change(", ".join(out), "given", f"left out: {reason}"))
    engine = [word.partition("=")[0] for word in shrunk.arguments if word.startswith(("--sglang-", "--router-"))]
    engine = [flag for flag in dict.fromkeys(engine) if flag not in _ENGINE_FLAGS_KEPT]
    for flag in engine:
        shrunk.drop(flag)
    if engine:
        shrunk.changes.append(Change(", ".join(engine), "given", "left out: SGLang's CPU engine has its own"))


def _yaml_files(shrunk: Shrunk, folder: Path) -> None:
    """Copies of the YAML files that win over flags, without what was changed here."""
    own = {*shrunk.own, *(word for word in (*MEGATRON_FLAGS, *SGLANG_FLAGS) if word.startswith("--"))}
    own = own.union(*_LEFT_OUT.values())
    ours = {flag.removeprefix("--").replace("-", "_") for flag in own}
    for flag in ("--custom-config-path", ROLE_CONFIG):
        given = shrunk.given(flag)
        if given:
            values = _without(read_mapping(flag, given[0]), ours)
            shrunk.set(flag, _write_yaml(folder / f"{flag.strip('-')}.yaml", values), say=False)


def _without(values: Any, names: set[str]) -> Any:
    if isinstance(values, list):
        return [_without(entry, names) for entry in values]
    if not isinstance(values, dict):
        return values
    return {key: _without(value, names) for key, value in values.items() if key not in names}


def _write_yaml(path: Path, values: Any) -> Path:
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path
