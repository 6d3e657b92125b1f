"""The run from start to end: base training, rollouts and training on them, evaluations, checkpoints, report.

State that outlives the process is the newest checkpoint and the first bytes of ``metrics.jsonl`` that it had seen;
everything else is a function of that and the configuration.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from ..errors import UserError
from ..records.store import is_record_folder
from ..report.command import REPORT_FILE, write_report
from ..report.inputs import RECORDS
from ..report.picture import write_picture
from ..report.summary import print_summary, summarize
from .arguments import flag_of, parse_arguments
from .checkpoint import (
    Checkpoint,
    checkpoint_files,
    read_checkpoint,
    remove_old_checkpoints,
    restore_tensors,
    save_checkpoint,
    state_tensors,
)
from .data import Alphabet, PromptSource, read_jsonl
from .model import build_model, initialize_megatron
from .progress import Progress
from .random_streams import EVAL, ROLLOUT, seeded_generator
from .recording import Recorder
from .rollout import Sample, collect_rollout, sample_responses
from .run_directory import RunDirectory
from .train_data import make_rollout_batch
from .training import demonstration_batch, demonstration_step, make_optimizer, train_on_rollout

DEMO_LOG_INTERVAL = 50  # base-training steps between rows of metrics
DEMO_SAVE_INTERVAL = 100
_ALLOCATOR = "DefaultCPUAllocator"  # torch's only sign of a CPU without memory is a RuntimeError with this in its text
_MODEL_FLAGS = (
    "alphabet",
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "rotary_base",
)


class Engine:
    """One run: the model, its optimizer, the data, and how far it has come (``counters``)."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.alphabet = Alphabet(args.alphabet)
        prompts = self._read("--prompt-data", args.prompt_data, args.label_key)
        self.heldout = self._read("--eval-prompt-data", args.eval_prompt_data[1], args.label_key)
        if args.demo_data is not None:
            self.demonstrations = self._read("--demo-data", args.demo_data, args.demo_response_key)
        else:
            self.demonstrations = prompts
        # args.rollout_seed reaches the order only with --rollout-shuffle; demonstrations are always shuffled.
        self.prompt_source = PromptSource(prompts, args.rollout_shuffle, args.rollout_seed)
        self.demo_source = PromptSource(self.demonstrations, True, args.seed)

        # Read before the run directory is made, so that a bad --load leaves none behind.
        resumes = bool(checkpoint_files(Path(args.save, "checkpoints")))
        self.initial = None if resumes else _checkpoint_to_load(args)
        self.directory = RunDirectory(args.save, args)
        self.device = torch.device(args.device)
        self.counters = {"phase": "demo", "demo_steps": 0, "rollouts": 0, "prompts": 0, "metrics_bytes": 0}

    def _read(self, flag: str, path: str, target_key: str):
        return read_jsonl(flag, path, self.args.input_key, target_key, self.alphabet)

    @property
    def finished(self) -> bool:
        return self.directory.summary_file.exists()

    def run(self, progress: Progress) -> None:
        """Continue from the newest checkpoint to the end, and leave the report."""
        self.progress = progress
        self.recorder = None
        if self.args.record is not None:
            self.recorder = Recorder(self.args.record, self.args, progress.say)
        initialize_megatron(self.device, self.args.num_threads)
        longest = max(len(record.prompt) for record in self.prompt_source.records + self.heldout)
        self.model = build_model(
            self.args, self.alphabet.size, longest + self.args.rollout_max_response_len, self.device
        )
        checkpoint = self._newest_checkpoint() or self.initial or _checkpoint_to_load(self.args)
        if checkpoint is not None:
            self.counters = checkpoint.counters["counters"]
        in_rollouts = self.counters["phase"] == "rollouts"
        self.optimizer = make_optimizer(self.args, self.model, self.args.lr if in_rollouts else self.args.demo_lr)
        if checkpoint is not None:
            restore_tensors(checkpoint.tensors, self.model, self.optimizer)
            self.prompt_source.position = self.counters["prompts"]
        self.directory.start_metrics(self.counters["metrics_bytes"])

        if not in_rollouts:
            self._train_base()
        if self.counters["metrics_bytes"] == 0 or not in_rollouts:
            self._evaluate("before")
            self._save()
        self._train_on_rollouts()
        remove_old_checkpoints(self.directory.checkpoints)
        write_picture(self.directory.path)
        self.directory.write_json("summary.json", summarize(self.args.loss_type, self.directory.path))

    # -- base training --

    def _train_base(self) -> None:
        args, started = self.args, time.monotonic()
        for step in self.progress.track("base training", self.counters["demo_steps"], args.demo_steps):
            self.demo_source.position = step * args.demo_batch_size
            batch = demonstration_batch(self.demo_source.take(args.demo_batch_size), self.alphabet, self.device)
            metrics = demonstration_step(args, self.model, self.optimizer, batch, step)
            done = self.counters["demo_steps"] = step + 1
            if done % DEMO_LOG_INTERVAL == 0 or done == args.demo_steps:
                self.directory.log({"demo/step": done, **metrics, "perf/demo_time": time.monotonic() - started})
                self.progress.show(f"loss {metrics['demo/loss']:.3f}")
                started = time.monotonic()
            if done % DEMO_SAVE_INTERVAL == 0 and done < args.demo_steps:
                self._save()
        self.counters["phase"] = "rollouts"
        # Momentum from the demonstrations says nothing about the policy gradient.
        self.optimizer = make_optimizer(args, self.model, args.lr)

    # -- rollouts --

    def _train_on_rollouts(self) -> None:
        args = self.args
        for rollout in self.progress.track("rollouts", self.counters["rollouts"], args.num_rollout):
            started = time.monotonic()
            generator = seeded_generator(self.device, args.seed, ROLLOUT, rollout, args.sampling_stream)
            groups, metrics = collect_rollout(args, self.model, self.alphabet, self.prompt_source, generator)
            sampled = time.monotonic()
            if metrics["rollout/groups_filled_up"] < len(groups):
                batch = make_rollout_batch(args, self.model, groups, self.device, rollout)
                metrics |= train_on_rollout(args, self.model, self.optimizer, batch, self.recorder)
            else:
                self.progress.say(
                    f"rollout {rollout}: every group of {args.max_sampling_rounds} sampling rounds had equal rewards;"
                    " nothing to learn from, no step taken"
                )
            self.counters["rollouts"] = rollout + 1
            self.counters["prompts"] = self.prompt_source.position
            times = {"perf/rollout_time": sampled - started, "perf/train_time": time.monotonic() - sampled}
            self.directory.log({"rollout/step": rollout, **metrics, **times})
            self.progress.show(_headline(metrics))
            last = rollout + 1 == args.num_rollout
            if last or (rollout + 1) % args.eval_interval == 0:
                self._evaluate("after" if last else None)
            if last or (rollout + 1) % args.save_interval == 0:
                self._save()

    def _evaluate(self, transcript: str | None) -> None:
        """Accuracy on the held-out prompts; ``eval/step`` counts the rollouts trained on so far."""
        args, started = self.args, time.monotonic()
        name, rollouts = args.eval_prompt_data[0], self.counters["rollouts"]
        # The same draws at every evaluation, so that two of them differ by the policy alone.
        generator = seeded_generator(self.device, args.seed, EVAL)
        groups = sample_responses(
            args, self.model, self.alphabet, self.heldout, args.n_samples_per_eval_prompt, generator
        )
        samples = [sample for group in groups for sample in group]
        metrics = {
            f"eval/{name}": float(np.mean([s.reward for s in samples])),
            f"eval/{name}/response_len/mean": float(np.mean([s.response_length for s in samples])),
            f"eval/{name}-truncated_ratio": float(np.mean([s.truncated for s in samples])),
        }
        self.directory.log({"eval/step": rollouts, **metrics, "perf/eval_time": time.monotonic() - started})
        accuracy, length, _ = metrics.values()
        self.progress.say(
            f"{name} after {rollouts} rollouts: accuracy {accuracy:.3f}, mean response length {length:.1f}"
        )
        if transcript is not None:
            self._write_transcript(transcript, samples)

    def _write_transcript(self, name: str, samples: list[Sample]) -> None:
        keys = ("prompt", "response", "label", "reward", "truncated")
        lines = (json.dumps({key: getattr(sample, key) for key in keys}) for sample in samples)
        self.directory.write_text(f"transcripts/{name}.jsonl", "\n".join(lines) + "\n")

    # -- checkpoints --

    def _save(self) -> None:
        self.counters["metrics_bytes"] = self.directory.metrics_bytes()
        header = {"counters": self.counters, "model": {name: getattr(self.args, name) for name in _MODEL_FLAGS}}
        number = self.counters["demo_steps" if self.counters["phase"] == "demo" else "rollouts"]
        path = self.directory.checkpoints / f"{self.counters['phase']}_{number:07d}.safetensors"
        save_checkpoint(path, state_tensors(self.model, self.optimizer), header)

    def _newest_checkpoint(self) -> Checkpoint | None:
        """The newest of this run that can be read; a damaged one is reported and passed over."""
        files = checkpoint_files(self.directory.checkpoints)
        for file in files:
            try:
                return read_checkpoint(file)
            except ValueError as error:
                before = "continuing from the one before" if file != files[-1] else "no other is left, starting anew"
                self.progress.say(f"{error}; {before}")
        return None


def _checkpoint_to_load(args: argparse.Namespace) -> Checkpoint | None:
    """The one that --load names, to begin a run with."""
    if args.load is None:
        return None
    file = Path(args.load)
    if file.is_dir():
        file = next(iter(checkpoint_files(file / "checkpoints")), file / "checkpoints")
    try:
        checkpoint = read_checkpoint(file)
    except ValueError as error:
        raise UserError(f"--load {args.load}: {error}") from None
    try:
        model, counters = (checkpoint.counters[name] for name in ("model", "counters"))
        differing = [name for name in _MODEL_FLAGS if model[name] != getattr(args, name)]
        if differing:
            raise UserError(f"--load {args.load}: its model has another {', '.join(map(flag_of, differing))}")
        if counters["phase"] == "demo":
            raise UserError(f"--load {args.load}: its base training is not finished; run its own command again first")
        counters["metrics_bytes"] = 0
    except (KeyError, TypeError):
        raise UserError(f"--load {args.load}: {file} is not a checkpoint of slime-fipo local") from None
    return checkpoint


def _headline(metrics: dict[str, float]) -> str:
    shown = {
        "reward": "rollout/raw_reward",
        "length": "rollout/response_len/mean",
        "entropy": "train/entropy_loss",
        "|f-1|": "fipo/influence_deviation",
    }
    return ", ".join(f"{label} {metrics[name]:.3f}" for label, name in shown.items() if name in metrics)


def main(argv: list[str]) -> None:
    """``slime-fipo local``: run, or continue, or show what a finished run left."""
    args = parse_arguments(argv)
    with Progress() as progress:
        directory = run(args, progress)
    if not (directory.path / REPORT_FILE).exists():
        own, records = directory.path / RECORDS, args.record and args.record.folder
        elsewhere = records is not None and records.resolve() != own.resolve() and is_record_folder(records)
        write_report([directory.path, records] if elsewhere else [directory.path])
    summary = json.loads(directory.summary_file.read_text(encoding="utf-8"))
    print_summary(progress.console, directory.path, summary)


def run(args: argparse.Namespace, progress: Progress) -> RunDirectory:
    """Begin, continue, or find finished the run of ``args``; its directory is complete afterwards."""
    engine = Engine(args)
    if engine.finished:
        progress.say(f"{args.save} is finished; nothing was run")
    else:
        try:
            engine.run(progress)
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and _ALLOCATOR not in str(error):
                raise
            raise UserError(
                "not enough memory; choose a smaller model, --rollout-max-response-len, --global-batch-size or"
                " --demo-batch-size"
            ) from None
    engine.directory.close()
    return engine.directory
