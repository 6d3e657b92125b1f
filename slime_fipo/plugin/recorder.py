"""Token records from slime's training actors: which responses this rank records in which step, and writing them.

slime's ``--rollout-data-postprocess-path`` hook tells before a rollout's first step what the rank is going to train;
the loss (``loss.py``) then hands over what it saw of each response, and the step's last one writes the file. Nothing
is gathered, and no module of slime's is changed. What a file holds is said in ``slime_fipo.records``.
"""

from __future__ import annotations

import logging
import math
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import accumulate
from pathlib import Path

import torch
from megatron.core import mpu
from slime.utils.misc import load_function
from torch import Tensor

from ..algorithm.context_parallel import ContextParallel
from ..records import StepHeader, write_step
from ..records.arguments import record_settings
from ..records.choice import chosen_groups
from ..records.packed import RECORDED_METRICS, token_records
from .arguments import HOOK_PATH, ROLLOUT_DATA_HOOK_PATH, fipo_settings, is_on, shift_is_apart
from .tracker import show_response

logger = logging.getLogger(__name__)


def is_main_rank() -> bool:
    """Whether this is the rank that logs slime's training metrics, and has its tracker's run."""
    return (
        mpu.get_data_parallel_rank(with_context_parallel=True) == 0
        and mpu.get_tensor_model_parallel_rank() == 0
        and mpu.is_pipeline_last_stage(ignore_virtual=True)
    )


def rollout_data_hook(args: Namespace, rollout_id: int, rollout_data: dict, *rest, **keywords) -> None:
    """For ``--rollout-data-postprocess-path``: chooses what this rank records of the rollout that is trained next.

    ``python3 -m slime_fipo`` sets it with ``--fipo-record``, and has it call the user's own hook first.
    """
    chained = getattr(args, "fipo_chained_rollout_data_hook_path", None)
    if chained:
        load_function(chained)(args, rollout_id, rollout_data, *rest, **keywords)
    global _steps
    _steps = {}  # lets go of the last rollout's tensors
    settings = record_settings(args)
    if settings is None or rollout_id % settings.interval:
        return
    if mpu.get_tensor_model_parallel_rank() != 0 or not mpu.is_pipeline_last_stage(ignore_virtual=True):
        return
    try:
        _steps = _recorders(args, rollout_id, rollout_data)
    except ValueError as error:
        _warn("choice", f"--fipo-record: rollout {rollout_id} is not recorded: {error}")


def recorder_of_step(args: Namespace) -> StepRecorder | None:
    """What records the step that is being trained, or None where this rank records nothing of it.

    Raises:
        ValueError: ``fipo_record`` is set, and slime was not told to call the two hooks that recording needs.
    """
    if getattr(args, "fipo_record", None) is None:
        return None
    step_id = getattr(args, "fipo_step_id", None)
    for announced, dest, hook in (
        (step_id, "custom_megatron_before_train_step_hook_path", HOOK_PATH),
        (_steps, "rollout_data_postprocess_path", ROLLOUT_DATA_HOOK_PATH),
    ):
        if announced is None:
            raise ValueError(f"fipo_record needs a hook of slime's: add '{dest}: {hook}' where fipo_record is set")
    return _steps.get(step_id)


@dataclass(frozen=True, eq=False)
class Response:
    """One response that this rank trains; ``recorded`` is False where only the tracker shows it."""

    tokens: Tensor
    prompt_length: int
    position: int
    group: int
    reward: float
    recorded: bool


class StepRecorder:
    """Collects what the loss saw of chosen responses, over micro-batches, and writes the step's file after the last.

    Args:
        folder: where record files go.
        header: the file's.
        responses: what to collect; none of them makes an empty file, which says that nothing is missing.
        shown: the one of them whose heatmap goes to slime's tracker, if any.
    """

    def __init__(self, folder: Path, header: StepHeader, responses: list[Response], shown: Response | None) -> None:
        self.folder, self.header, self.shown = folder, header, shown
        # slime hands the loss the rollout's own tensors, so a response is known by the identity of its tokens.
        self.pending = {id(response.tokens): response for response in responses}
        self.collected: list[tuple[list[Response], list, Tensor]] = []  # with spans, and values [names, tokens]
        self.names: tuple[str, ...] = ()
        self.written = False

    def held(self, tokens: Sequence[Tensor]) -> list[int]:
        """Indices of a micro-batch's responses (by their whole token tensors) that :meth:`add` is to be given.

        Empty when a recomputation brings the same micro-batch again.
        """
        if not self.pending and not self.written:
            self._write()
        return [i for i, each in enumerate(tokens) if id(each) in self.pending]

    def add(
        self,
        held: Sequence[int],
        tokens: Sequence[Tensor],
        lengths: Sequence[int],
        cp: ContextParallel | None,
        values: Mapping[str, Tensor],
    ) -> None:
        """Take over what the loss saw of ``held`` responses of a micro-batch.

        Args:
            held: what :meth:`held` returned.
            tokens: whole sequences, one per response of the micro-batch.
            lengths: this rank's response tokens per response.
            cp: how responses are spread over context-parallel ranks.
            values: per-token tensors [sum of lengths]: ``loss_mask``, ``shift``, ``advantages``, ``RECORDED_METRICS``
                and, if known, ``mismatch``.
        """
        rows = [torch.cat([part[i] for i in held]) for part in (v.detach().split(lengths) for v in values.values())]
        responses = [self.pending.pop(id(tokens[i])) for i in held]
        self.names = tuple(values)
        spans = [_spans(cp, i, lengths[i]) for i in held]
        self.collected.append((responses, spans, torch.stack([row.float() for row in rows])))
        if not self.pending:
            self._write()

    def _write(self) -> None:
        self.written = True
        step = f"rollout {self.header.rollout_id}, step {self.header.step_id}"
        responses = [response for some, _, _ in self.collected for response in some]
        # A full disk, a folder that is gone, a tracker that is not reached: none is worth a training step.
        try:
            records, spans = self._records(responses)
            kept = [i for i, response in enumerate(responses) if response.recorded]
            write_step(self.folder, self.header, [records[i] for i in kept], [spans[i] for i in kept])
            _warned.discard("write")
        except Exception as error:
            _warn("write", f"--fipo-record: {step} is not recorded: {type(error).__name__}: {error}")
            return
        finally:
            self.collected.clear()
        if self.shown is None:
            return
        try:
            show_response(records[responses.index(self.shown)], self.header)
            _warned.discard("show")
        except Exception as error:
            _warn("show", f"--fipo-record-wandb: {step} is not shown: {type(error).__name__}: {error}")

    def _records(self, responses: list[Response]) -> tuple[list, list]:
        if not responses:
            return [], []
        spans = [each for _, held, _ in self.collected for each in held]
        # One copy for the values and one for the token ids, so one or two waits for the device.
        rows = torch.cat([values for _, _, values in self.collected], dim=1).cpu().numpy()
        whole = torch.cat([response.tokens for response in responses]).cpu()
        whole = [each.numpy() for each in whole.split([response.tokens.numel() for response in responses])]
        values = dict(zip(self.names, rows, strict=True))
        records = token_records(
            [each[: response.prompt_length] for each, response in zip(whole, responses, strict=True)],
            [each[response.prompt_length :] for each, response in zip(whole, responses, strict=True)],
            [response.position for response in responses],
            [response.group for response in responses],
            [response.reward for response in responses],
            loss_mask=values["loss_mask"],
            shift=values["shift"],
            advantages=values["advantages"],
            metrics={name: values[name] for name in RECORDED_METRICS},
            mismatch=values.get("mismatch"),
            spans=spans,
        )
        return records, spans


# By step of the rollout that was announced last; None before the first.
_steps: dict[int, StepRecorder] | None = None
_warned: set[str] = set()


def _warn(kind: str, message: str) -> None:
    """Once, and again only after it worked in between."""
    if kind not in _warned:
        _warned.add(kind)
        logger.warning("%s; training goes on", message)


def _spans(cp: ContextParallel | None, index: int, length: int) -> list[tuple[int, int]]:
    """The ranges of response ``index`` that this rank holds, ``length`` tokens in all."""
    if cp is None:
        return [(0, length)]
    edges = [0, *accumulate(cp.chunk_lengths[index])]
    return [(edges[chunk], edges[chunk + 1]) for chunk in cp.own_chunks]


def _recorders(args: Namespace, rollout_id: int, rollout_data: dict) -> dict[int, StepRecorder]:
    """One for the rollout's first and one for its last step.

    Raises:
        ValueError: the responses' places in the rollout are not known.
    """
    settings = record_settings(args)
    sizes, counts = rollout_data["global_batch_sizes"], rollout_data["num_microbatches"]
    samples = len(_timer().seq_lens)
    if samples > args.rollout_batch_size * args.n_samples_per_prompt:
        raise ValueError(
            f"it has {samples} samples of {args.rollout_batch_size} prompts with {args.n_samples_per_prompt} responses"
            " each, so which of them belong together is not known"
        )
    positions, rewards = _positions(args, rollout_data), rollout_data.get("raw_reward")
    starts, first_micro_batches = [0, *accumulate(sizes)], [0, *accumulate(counts)]
    recorders = {}
    for step_id in sorted({0, len(counts) - 1}):
        in_step = range(starts[step_id], starts[step_id + 1])
        micro_batches = rollout_data["micro_batch_indices"][
            first_micro_batches[step_id] : first_micro_batches[step_id + 1]
        ]
        local = [i for micro_batch in micro_batches for i in micro_batch]
        if not all(positions[i] in in_step for i in local):
            raise ValueError(f"step {step_id} does not hold the rollout's responses {in_step.start} to {in_step.stop}")
        groups = chosen_groups(
            settings,
            rollout_id=rollout_id,
            step_id=step_id,
            steps_per_rollout=len(counts),
            positions=in_step,
            samples_per_prompt=args.n_samples_per_prompt,
        )
        chosen = {position for group in groups for position in group}
        shows = is_on(args, "fipo_record_wandb") and is_main_rank()
        wanted = [i for i in local if positions[i] in chosen] or (local[:1] if shows else [])
        responses = [
            Response(
                tokens=rollout_data["tokens"][i],
                prompt_length=rollout_data["total_lengths"][i] - rollout_data["response_lengths"][i],
                position=positions[i],
                group=positions[i] // args.n_samples_per_prompt,
                reward=_number(rewards[positions[i]]) if rewards is not None else math.nan,
                recorded=positions[i] in chosen,
            )
            for i in wanted
        ]
        header = StepHeader(
            rollout_id=rollout_id,
            step_id=step_id,
            steps_per_rollout=len(counts),
            config=fipo_settings(args).as_dict(),
            source="slime",
            dp_rank=mpu.get_data_parallel_rank(),
            dp_size=mpu.get_data_parallel_world_size(),
            cp_rank=mpu.get_context_parallel_rank(),
            cp_size=mpu.get_context_parallel_world_size(),
            shift_from="rollout" if args.use_rollout_logprobs and not shift_is_apart(args) else "train",
            samples_per_rollout=samples,
            samples_per_prompt=args.n_samples_per_prompt,
            tokenizer=getattr(args, "hf_checkpoint", None),
        )
        recorders[step_id] = StepRecorder(settings.folder, header, responses, responses[0] if shows else None)
    return recorders


def _number(reward) -> float:
    try:
        return float(reward)
    except (TypeError, ValueError):  # a reward of several parts
        return math.nan


def _timer():
    """slime's timer, whose ``seq_lens`` are the lengths of the whole rollout's samples, in order."""
    try:
        from slime.observability.timer import Timer
    except ImportError:  # before main's observability package
        from slime.utils.timer import Timer
    return Timer()


def _positions(args: Namespace, rollout_data: dict) -> list[int]:
    """The place in the rollout of each response that this rank trains.

    slime v0.3.0 and v0.3.1 drop what main keeps as ``partition``. It is a function of the lengths, so slime's own
    scheduler gives it again, and the micro-batches that are there say whether it did.

    Raises:
        ValueError: it did not.
    """
    if rollout_data.get("partition") is not None:
        return list(rollout_data["partition"])
    from slime.utils.dp_schedule import build_dp_schedule

    lengths = _timer().seq_lens
    stages = mpu.get_virtual_pipeline_model_parallel_world_size() or 1
    parallel = {
        "dp_size": mpu.get_data_parallel_world_size(),
        "cp_size": mpu.get_context_parallel_world_size(),
        "vpp_size": stages,
        "microbatch_group_size_per_vp_stage": getattr(args, "microbatch_group_size_per_vp_stage", None)
        or mpu.get_pipeline_model_parallel_world_size(),
    }
    ids = "rollout_indices" if "rollout_indices" in signature(build_dp_schedule).parameters else "group_indices"
    try:
        partitions, micro_batches, *_ = build_dp_schedule(
            args, parallel, lengths, global_batch_size=args.global_batch_size, **{ids: list(range(len(lengths)))}
        )
    except AssertionError as error:
        raise ValueError(f"this slime's schedule cannot be rebuilt ({error})") from None
    rank = mpu.get_data_parallel_rank()
    rebuilt = ([lengths[i] for i in partitions[rank]], [list(indices) for indices in micro_batches[rank]])
    if rebuilt != (list(rollout_data["total_lengths"]), [list(i) for i in rollout_data["micro_batch_indices"]]):
        raise ValueError("this slime does not keep the responses' places in the rollout, and several belong together")
    return partitions[rank]
