"""Rules of ``slime-fipo check`` that open what the command names: checkpoints' ``config.json`` and data files.

Each rule is a generator over the parsed command, as in ``flag_rules.py``.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from ..algorithm import FipoConfig
from ..recipes.integer_answer import label_integer, shown
from .command import Command
from .derived import OUR_REWARD, is_dapo, longest_sequence
from .finding import Finding, error, warning

PROGRESS_AFTER_SECONDS = 1.0
# Of slime's models, those that its all-gather context parallelism is for.
SPARSE_ATTENTION = {"DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM"}
TRACKER = "latest_checkpointed_iteration.txt"


# -- checkpoints --


def checkpoints(command: Command, config: FipoConfig | None) -> Iterator[Finding]:
    args = command.args
    if args.save_interval is not None and args.save is None:
        yield error("--save-interval needs --save; add it")
    if args.save is None:
        yield warning("--save is missing: nothing is kept, and an interrupted run starts anew; add --save and --load")
    elif args.load is None or Path(args.load).resolve() != Path(args.save).resolve():
        yield warning(
            f"--load {args.load} is not --save {args.save}: the same command again would not continue the run; give"
            " both the same folder"
        )
    elif not args.override_opt_param_scheduler and not args.use_checkpoint_opt_param_scheduler:
        yield warning(
            "a continued run cannot have another --num-rollout or --lr than its checkpoint: Megatron refuses; add"
            " --override-opt-param-scheduler"
        )
    if not _is_checkpoint(args.load):
        if args.load and Path(args.load).is_dir() and any(Path(args.load).iterdir()):
            yield warning(
                f"--load {args.load} holds no checkpoint ({TRACKER}), so slime starts from --ref-load without saying"
                " so; check the path"
            )
        if args.ref_load is None:
            yield error("--ref-load is missing, and --load holds no checkpoint to start from; add --ref-load")
        elif not _is_checkpoint(args.ref_load):
            yield error(
                f"--ref-load {args.ref_load} is no Megatron checkpoint ({TRACKER} is missing); convert the model with"
                " slime's tools/convert_hf_to_torch_dist.py"
            )
        elif not (Path(args.ref_load) / TRACKER).is_file():
            yield warning(
                f"--ref-load {args.ref_load} is a Hugging Face folder, which slime v0.3.1 and later load for the models"
                " they know; for others convert it with slime's tools/convert_hf_to_torch_dist.py"
            )


def _is_checkpoint(folder: str | None) -> bool:
    """Whether slime starts from that folder: Megatron's format, or Hugging Face's."""
    return folder is not None and any((Path(folder) / name).is_file() for name in (TRACKER, "config.json"))


def reference_model(command: Command, config: FipoConfig | None) -> Iterator[Finding]:
    """A KL term needs the reference model, also where training continues from --load."""
    args = command.args
    if args.kl_coef == 0 and not args.use_kl_loss:
        return
    flag = "--use-kl-loss" if args.use_kl_loss else f"--kl-coef {args.kl_coef:g}"
    if args.ref_load is None and _is_checkpoint(args.load):  # otherwise `checkpoints` asks for it
        yield error(f"{flag} needs the reference model of --ref-load, which is missing; add it, or drop {flag}")
    elif args.ref_load is not None and _is_checkpoint(args.load) and not _is_checkpoint(args.ref_load):
        yield error(
            f"{flag} needs the reference model, and --ref-load {args.ref_load} is no Megatron checkpoint ({TRACKER} is"
            f" missing); check the path, or drop {flag}"
        )


def model(command: Command, config: FipoConfig | None) -> Iterator[Finding]:
    """The flags against the Hugging Face configuration."""
    args = command.args
    if args.hf_checkpoint is None:
        yield error("--hf-checkpoint is missing; SGLang and the tokenizer need it")
        return
    file = Path(args.hf_checkpoint) / "config.json"
    try:
        declared = json.loads(file.read_text(encoding="utf-8"))
        architectures = declared.get("architectures")
        declared = declared.get("text_config", declared)
        positions = declared.get("max_position_embeddings")
    except (OSError, ValueError, AttributeError):
        yield error(f"--hf-checkpoint {args.hf_checkpoint} has no readable config.json; download the model there")
        return
    yield from _same_shape(args, declared)
    cp = args.context_parallel_size
    if (
        args.allgather_cp
        and cp > 1
        and not SPARSE_ATTENTION & set(architectures if isinstance(architectures, list) else ())
    ):
        yield error(f"--allgather-cp with --context-parallel-size {cp} is for sparse-attention models only; drop it")
    if type(positions) is int:
        yield from _positions(command, positions, file)


def _same_shape(args: argparse.Namespace, declared: dict) -> Iterator[Finding]:
    rope = declared.get("rope_parameters")
    rope_base = rope.get("rope_theta") if isinstance(rope, dict) else None
    head = args.kv_channels
    if head is None and args.hidden_size and args.num_attention_heads:
        head = args.hidden_size // args.num_attention_heads
    pairs = {
        "num-layers": (args.num_layers, declared.get("num_hidden_layers")),
        "hidden-size": (args.hidden_size, declared.get("hidden_size")),
        "ffn-hidden-size": (args.ffn_hidden_size, None if args.num_experts else declared.get("intermediate_size")),
        "num-attention-heads": (args.num_attention_heads, declared.get("num_attention_heads")),
        "num-query-groups": (args.num_query_groups, declared.get("num_key_value_heads")),
        "kv-channels": (head, declared.get("head_dim")),
        "vocab-size": (args.vocab_size, declared.get("vocab_size")),
        "rotary-base": (args.rotary_base, rope_base or declared.get("rope_theta")),
        "norm-epsilon": (args.norm_epsilon, declared.get("rms_norm_eps")),
    }
    differing = {
        flag: (given, f"{wanted:.10g}" if isinstance(wanted, int | float) else repr(wanted))
        for flag, (given, wanted) in pairs.items()
        if given is not None and wanted is not None and given != wanted
    }
    for flag, (given, number) in differing.items():
        fix = f"use {number}, or source a script of that model's size from scripts/models"
        if set(differing) == {"rotary-base"}:  # the same model with a longer context, such as Qwen3's 2507 releases
            fix = f"add --rotary-base {number}"
            if declared.get("model_type") in ("qwen3", "qwen3_moe"):  # whose scripts read the variable
                fix = f"set MODEL_ARGS_ROTARY_BASE={number} before sourcing the model's script, or {fix}"
        yield error(f"--{flag} {given:.10g} is not the {number} of --hf-checkpoint {args.hf_checkpoint}; {fix}")
    tied = declared.get("tie_word_embeddings")
    if tied is not None and tied == args.untie_embeddings_and_output_weights:
        yield error(
            f"--hf-checkpoint {args.hf_checkpoint} has {'tied' if tied else 'untied'} embeddings;"
            f" {'drop' if tied else 'add'} --untie-embeddings-and-output-weights"
        )
    family = str(declared.get("model_type"))
    if family.startswith(("qwen2", "qwen3")):
        is_qwen3 = family.startswith("qwen3")
        for flag, given, wanted in (
            ("--qk-layernorm", args.qk_layernorm, is_qwen3),
            ("--add-qkv-bias", args.add_qkv_bias, declared.get("attention_bias", not is_qwen3)),
        ):
            if given != bool(wanted):
                has, fix = ("has", "add") if wanted else ("does not have", "drop")
                yield error(f"--hf-checkpoint {args.hf_checkpoint} is a {family}, which {has} {flag}; {fix} it")


def _positions(command: Command, positions: int, file: Path) -> Iterator[Finding]:
    args = command.args
    extend = f"extend it: python3 -m slime_fipo.recipes.extend_context {args.hf_checkpoint} NEW --positions N"
    response = args.rollout_max_response_len
    if args.rollout_max_prompt_len is None and args.rollout_max_context_len is None and response == positions:
        yield error(
            f"--rollout-max-response-len {response} leaves a prompt none of the {positions} positions that {file}"
            f" declares, and --rollout-max-prompt-len is missing; add it and shorten the response, or {extend}"
        )
    lengths = {"--rollout-max-response-len": longest_sequence(args)}
    prompt = args.eval_max_prompt_len or args.rollout_max_prompt_len or 0
    for dataset in command.eval_datasets:
        flag = f"max_response_len of {dataset.name} in {dataset.source}"
        if dataset.max_response_len is None:
            flag = "--eval-max-response-len"
        tokens = dataset.max_response_len or args.eval_max_response_len
        lengths[flag] = tokens and tokens + prompt
    for flag, longest in lengths.items():
        if longest and longest > positions:
            yield error(
                f"prompt and {flag} make up to {longest} tokens, and {file} declares {positions} positions; shorten"
                f" them or {extend}"
            )
            break


# -- data --


def data(command: Command, config: FipoConfig | None) -> Iterator[Finding]:
    args = command.args
    if args.prompt_data is not None:
        keys = {"--input-key": args.input_key, "--label-key": args.label_key}
        judge = _label_judge(args.custom_rm_path, args.rm_type)
        yield from _data_file("--prompt-data", args.prompt_data, keys, judge)
    elif not args.debug_train_only:
        yield error("--prompt-data is missing; add it")
    for dataset in command.eval_datasets:
        judge = _label_judge(dataset.custom_rm_path or args.custom_rm_path, dataset.rm_type or args.rm_type)
        keys = {
            "--eval-input-key": dataset.input_key or args.eval_input_key or args.input_key,
            "--eval-label-key": dataset.label_key or args.eval_label_key or args.label_key,
        }
        flag = dataset.source if dataset.source == "--eval-prompt-data" else f"{dataset.name} in {dataset.source}:"
        if "${" not in dataset.path:  # filled in when slime reads the file
            yield from _data_file(flag, dataset.path, keys, judge)


LabelJudge = Callable[[Any], Callable[[str], Finding] | None]


def _label_judge(custom_rm_path: str | None, rm_type: str | None) -> LabelJudge | None:
    """What says of a label whether the reward can compare it: None, ``error`` or ``warning``."""
    if custom_rm_path == OUR_REWARD:
        return _our_verdict
    return _slimes_verdict if custom_rm_path is None and is_dapo(rm_type) else None


def _our_verdict(label) -> Callable[[str], Finding] | None:
    try:
        label_integer(label)
    except ValueError:
        return error
    return None


def _slimes_verdict(label) -> Callable[[str], Finding] | None:
    """slime's own verifier reads labels as floats: plain ones for certain; of others it is asked, where slime is."""
    if (verdict := _our_verdict(label)) is not None or re.fullmatch(r"[+-]?[0-9]{1,15}(?:\.0+)?", str(label).strip()):
        return verdict
    if (verify := _slimes_verifier()) is None:
        return warning
    try:
        return None if verify(f"Answer: {label_integer(label)}", label)["acc"] else error
    except (ValueError, TypeError, OverflowError):
        return error


@functools.cache
def _slimes_verifier() -> Callable[[str, Any], dict] | None:
    """``compute_score`` of the slime that this Python would import; its package, which needs Ray, stays out."""
    package = find_spec("slime")
    for folder in (package and package.submodule_search_locations) or ():
        file = Path(folder) / "rollout" / "rm_hub" / "math_dapo_utils.py"
        if file.is_file():
            spec = spec_from_file_location("math_dapo_utils", file)
            spec.loader.exec_module(module := module_from_spec(spec))
            return module.compute_score
    return None


def _data_file(flag: str, path: str, keys: dict[str, str | None], judge: LabelJudge | None) -> Iterator[Finding]:
    """``keys``: flag of each key and the key."""
    path, bounds = sliced_path(path)
    if not Path(path).is_file():
        yield error(f"{flag} {path} does not exist; check the path")
        return
    if not path.endswith((".jsonl", ".parquet")):
        yield error(f"{flag} {path} is neither .jsonl nor .parquet, which is all that slime reads; convert it")
        return
    label_flag, label_key = list(keys.items())[1]
    if label_key is None:
        yield error(f"{label_flag} is missing, so that no answer can be checked; add {label_flag} label")
    if path.endswith(".parquet") and find_spec("pyarrow") is None:
        return  # slime itself needs it for such files
    labels: dict[Callable[[str], Finding], tuple[int, str]] = {}  # the first label of each verdict, and its row
    used = 0
    try:
        for number, row in chosen_rows(path, bounds):
            used += 1
            for name, key in keys.items():
                if key is not None and key not in row:
                    columns = ", ".join(sorted(map(str, row)))
                    yield error(
                        f"{name} {key} is not in every row of {path}: row {number} has {columns or 'nothing'}; name its"
                        " key"
                    )
                    return
            verdict = judge(row[label_key]) if judge is not None and label_key is not None else None
            if verdict is not None and verdict not in labels:
                labels[verdict] = (number, shown(row[label_key]))
    except (OSError, ValueError) as problem:
        yield error(f"{flag} {path} {problem}; fix the file")
        return
    if not used:
        yield error(f"{flag} {path} has no rows; fix the file")
    elif error in labels:
        number, label = labels[error]
        other = f"--custom-rm-path {OUR_REWARD}" if judge is _slimes_verdict else "another --custom-rm-path"
        yield error(
            f"{flag} {path} has the label {label} in row {number}, and the reward compares integers; use other data or"
            f" {other}"
        )
    elif warning in labels:
        number, label = labels[warning]
        yield warning(
            f"{flag} {path} has the label {label} in row {number}, which slime's verifier may not read; use other data"
            f" or --custom-rm-path {OUR_REWARD}"
        )


def sliced_path(path: str) -> tuple[str, slice]:
    """slime's ``PATH@[START:END]``: the file and its rows that are used."""
    match = re.fullmatch(r"(.*)@\[(-?\d*):(-?\d*)\]", path, re.DOTALL)
    if match is None:
        return path, slice(None)
    try:
        return match[1], slice(*(int(bound) if bound else None for bound in (match[2], match[3])))
    except ValueError:  # a lone minus sign, or more digits than Python reads
        return path, slice(None)


def chosen_rows(path: str, bounds: slice) -> Iterator[tuple[int, dict]]:
    """The rows of ``path`` within ``bounds``, numbered from 1 as they stand in the file."""
    rows = _parquet_rows if path.endswith(".parquet") else _jsonl_rows
    if bounds == slice(None):
        yield from enumerate(rows(path), 1)
        return
    chosen = range(sum(1 for _ in rows(path)))[bounds]
    for index, row in enumerate(rows(path)):
        if index in chosen:
            yield index + 1, row


def _jsonl_rows(path: str) -> Iterator[dict]:
    with open(path, "rb") as file:
        for number, line in enumerate(_with_progress(file, path, os.path.getsize(path), len), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError):
                raise ValueError(f"holds lines that are no JSON, line {number} first, and slime drops those") from None
            if not isinstance(row, dict):
                raise ValueError(f"holds no JSON objects, one per line: see line {number}")
            yield row


def _parquet_rows(path: str) -> Iterator[dict]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            batches = _with_progress(file.iter_batches(), path, file.metadata.num_rows, lambda batch: batch.num_rows)
            for batch in batches:
                yield from batch.to_pylist()
    except (ArrowException, OSError) as problem:
        raise ValueError(f"is no Parquet file ({str(problem).splitlines()[0]})") from None


def _with_progress(parts: Iterable, path: str, total: int, size_of: Callable[[Any], int]) -> Iterator:
    """``parts`` of a file whose sizes sum to ``total``; a terminal sees a progress bar once a second has passed."""
    console = Console(stderr=True)
    done, show_at = 0, time.monotonic() + PROGRESS_AFTER_SECONDS
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"Reading {escape(os.path.basename(path))}", total=total, visible=False)
        for part in parts:
            yield part
            done += size_of(part)
            if time.monotonic() > show_at:
                progress.update(task, completed=done, visible=True)
                show_at = time.monotonic() + 0.1


FILE_RULES = (checkpoints, reference_model, model, data)
