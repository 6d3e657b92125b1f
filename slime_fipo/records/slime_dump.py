"""Token records from slime's own dump (``--dump-details``), in every layout that slime writes.

slime main writes one ``train_data/{rollout}.pt`` of ``format_version`` 2, v0.3.0 and v0.3.1 one ``{rollout}_{rank}.pt``
per rank with context-parallel slices and tensor-parallel duplicates; beside them stands ``rollout_data/{rollout}.pt``.
Files are read with torch's restricted unpickler, so nothing in them is executed.

What a dump can tell depends on the run. Always: the mismatch between the engines, where it holds both log-probs. With
``--use-rollout-logprobs`` on slime main everything: the dumped ``log_probs`` are then those of each sample's own
training forward, so Δ is known and F and f are rebuilt by ``fipo_weights``.
"""

from __future__ import annotations

import pickle
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..algorithm import FipoConfig, fipo_weights
from ..algorithm.context_parallel import chunk_edges, own_chunks
from ..errors import UserError
from .packed import FATE_METRICS, token_fates
from .schema import StepHeader, TokenRecord
from .store import RecordSet

FORMAT_VERSION = 2
NO_FATES = dict.fromkeys(FATE_METRICS.values(), 0)  # of a token whose weight nobody knows
_MERGED = re.compile(r"(\d+)\.pt")
_PER_RANK = re.compile(r"(\d+)_(\d+)\.pt")
_EVALUATION = re.compile(r"eval_(\d+)\.pt")
# What numpy arrays and scalars in a pickle are made of; torch allows nothing beyond these and its own tensors.
# numpy 1.26 has a numpy._core too, with nothing in it.
_MULTIARRAY = np._core.multiarray if int(np.__version__.split(".")[0]) >= 2 else np.core.multiarray
_NUMPY = [
    np.ndarray,
    np.dtype,
    *(kind for name in dir(np.dtypes) if isinstance(kind := getattr(np.dtypes, name), type)),
    *(getattr(_MULTIARRAY, n) for n in ("_reconstruct", "scalar")),
]


def is_dump(folder: Path) -> bool:
    """Whether ``folder`` looks like slime's ``--dump-details``."""
    return any(any((folder / part).glob("*.pt")) for part in ("train_data", "rollout_data"))


@dataclass
class _Sample:
    """One training sample, whole. Per-token values are float32 [T] or absent."""

    position: int
    step: int
    tokens: np.ndarray
    response_length: int
    loss_mask: np.ndarray
    values: dict[str, np.ndarray]
    present: np.ndarray  # [T] bool; False where the file of a context-parallel rank is missing

    def difference(self) -> np.ndarray:
        return self.values["log_probs"] - self.values["rollout_log_probs"]


class SlimeDump:
    """One ``--dump-details`` folder.

    Args:
        folder: holds ``train_data`` and ``rollout_data``; either may be missing.
        config: the run's FIPO settings, which no dump says.
        use_rollout_logprobs: whether the run had ``--use-rollout-logprobs`` (and not ``--get-mismatch-metrics``), which
            no dump says either. True: the dumped log-probs are those of the training forward. False: those from before
            the rollout's first step. None: unknown, so only the first step is read, where both are the same.

    Raises:
        UserError: the folder is no dump.
    """

    def __init__(self, folder: Path, config: FipoConfig, use_rollout_logprobs: bool | None = None):
        self.folder, self.config, self.use_rollout_logprobs = folder, config, use_rollout_logprobs
        self._train: dict[int, list[Path]] = defaultdict(list)
        self._rollout: dict[int, Path] = {}
        self._evaluation: dict[int, Path] = {}
        for path in sorted((folder / "train_data").glob("*.pt")):
            if match := _MERGED.fullmatch(path.name) or _PER_RANK.fullmatch(path.name):
                self._train[int(match[1])].append(path)
        for path in sorted((folder / "rollout_data").glob("*.pt")):
            if match := _MERGED.fullmatch(path.name):
                self._rollout[int(match[1])] = path
            elif match := _EVALUATION.fullmatch(path.name):
                self._evaluation[int(match[1])] = path
        if not self.rollout_ids:
            raise UserError(
                f"{folder} holds no dump of slime's (train_data/*.pt, rollout_data/*.pt); give the folder of"
                " --dump-details"
            )

    @property
    def rollout_ids(self) -> list[int]:
        return sorted({*self._train, *self._rollout})

    @property
    def trained_ids(self) -> list[int]:
        """Rollouts of which training data is there: the only ones of which :meth:`read` has records."""
        return sorted(self._train)

    @property
    def tokenizer(self) -> str | None:
        """The folder's tokenizer, if slime saved one."""
        folder = self.folder / "tokenizer"
        return str(folder) if folder.is_dir() else None

    def missing(self) -> list[str]:
        """Rollouts of which one of the two files is not there."""
        sentences = [
            f"rollout {i}: {part}/{i}.pt is missing"
            for part, files in (("train_data", self._train), ("rollout_data", self._rollout))
            if files
            for i in self.rollout_ids
            if i not in files
        ]
        gaps = set(range(min(self.rollout_ids), max(self.rollout_ids))) - set(self.rollout_ids)
        return sentences + [f"rollout {i} is not in the dump" for i in sorted(gaps)]

    def read(self, rollout_id: int) -> RecordSet:
        """Every response of a rollout at the optimizer step that trained on it.

        Shift, Future-KL and weights are there only with ``use_rollout_logprobs`` and the training forward's log-probs;
        elsewhere ``shift`` is 0 and ``future_kl`` and ``influence`` are None.

        Raises:
            UserError: a file cannot be read, or its parts do not fit together; the message names it.
        """
        found = RecordSet()
        if rollout_id not in self._train:
            return found
        rollout = self._rollout_samples(rollout_id)
        paths = self._train[rollout_id]
        contents = [_load(path) for path in paths]
        merged = [c for c in contents if "format_version" in c]
        if merged:
            samples, raw_rewards = _merged_samples(paths[contents.index(merged[0])], merged[0])
        else:
            samples, raw_rewards = _rank_samples(paths, contents, rollout)
        expected = len(rollout) if rollout is not None else len(raw_rewards or samples)
        absent = sorted(set(range(expected)) - {sample.position for sample in samples})
        if absent:
            shown = ", ".join(map(str, absent[:5])) + (", …" if len(absent) > 5 else "")
            found.missing.append(
                f"rollout {rollout_id}: {len(absent)} of {expected} responses ({shown}) are in no file of train_data;"
                " files of some ranks are missing"
            )
        holes = [sample.position for sample in samples if not sample.present.all()]
        if holes:
            found.missing.append(
                f"rollout {rollout_id}: tokens of {len(holes)} responses ({', '.join(map(str, holes[:5]))}"
                f"{', …' if len(holes) > 5 else ''}) are missing; files of some context-parallel ranks are not there"
            )
        if self.use_rollout_logprobs and (lacking := [n for n in _VALUES if not all(n in s.values for s in samples)]):
            found.missing.append(
                f"rollout {rollout_id}: train_data holds no {' and no '.join(lacking)} of some responses, so Δ, F and f"
                " cannot be rebuilt in spite of --use-rollout-logprobs"
            )
        groups = _groups(rollout, expected)
        sizes = Counter(groups)
        for step, members in sorted(_by_step(samples).items()):
            header = StepHeader(
                rollout_id=rollout_id,
                step_id=step,
                steps_per_rollout=max(sample.step for sample in samples) + 1,
                config=self.config.as_dict(),
                source="slime dump",
                shift_from="rollout" if self.use_rollout_logprobs else "train",
                samples_per_rollout=expected,
                samples_per_prompt=max(sizes.values()),
                tokenizer=self.tokenizer,
            )
            rewards = [_reward(sample.position, rollout, raw_rewards) for sample in members]
            found.records += self._records(header, members, groups, rewards)
        return found

    def _records(
        self, header: StepHeader, samples: Sequence[_Sample], groups: list[int], rewards: list[float]
    ) -> Iterator[TokenRecord]:
        whole = [sample for sample in samples if sample.present.all()]
        rebuilt = self._rebuild(whole)
        starts = np.cumsum([0] + [sample.response_length for sample in whole])
        spans = {s.position: slice(a, b) for s, a, b in zip(whole, starts, starts[1:], strict=False)}
        for sample, reward in zip(samples, rewards, strict=True):
            span = spans.get(sample.position)
            own = {name: values[span] for name, values in rebuilt.items()} if rebuilt and span else {}
            zeros = np.zeros(sample.response_length, dtype=np.float32)
            both = {"log_probs", "rollout_log_probs"} <= sample.values.keys()
            # At the first step the policy has not moved yet, so that all of the difference is mismatch.
            first_or_recomputed = header.step_id == 0 or self.use_rollout_logprobs is False
            prompt_length = len(sample.tokens) - sample.response_length
            yield TokenRecord(
                position=sample.position,
                group=groups[sample.position],
                reward=reward,
                prompt=sample.tokens[:prompt_length],
                tokens=sample.tokens[prompt_length:],
                loss_mask=sample.loss_mask,
                shift=own.get("shift", zeros),
                advantages=sample.values.get("advantages", zeros),
                future_kl=own.get("future_kl"),
                influence=own.get("influence"),
                fate=own.get("fate", token_fates(NO_FATES, sample.loss_mask)),
                mismatch=sample.difference() if both and first_or_recomputed else None,
                present=sample.present,
                header=header,
            )

    def _rebuild(self, samples: Sequence[_Sample]) -> dict[str, np.ndarray] | None:
        """Δ, F, f and fate of one step's samples packed, or None where the dump does not hold what they need."""
        if not self.use_rollout_logprobs or not samples or not all(n in s.values for s in samples for n in _VALUES):
            return None
        packed = [torch.from_numpy(np.concatenate([s.values[n] for s in samples])) for n in _VALUES]
        loss_mask = np.concatenate([s.loss_mask for s in samples])
        result = fipo_weights(*packed, torch.from_numpy(loss_mask), [s.response_length for s in samples], self.config)
        return {
            "shift": (packed[0] - packed[1]).numpy(),
            "future_kl": result.future_kl.numpy(),
            "influence": result.metrics["influence_weight"].numpy(),
            "fate": token_fates({n: v.numpy() for n, v in result.metrics.items()}, loss_mask),
        }

    def trend(self) -> Iterator[dict]:
        """Rows as in the embedded engine's ``metrics.jsonl``, from ``rollout_data``: reward and length of each rollout
        and evaluation. Rewards that are dictionaries without a number to read are left out."""
        for rollout_id, path in sorted(self._rollout.items()):
            yield {"rollout/step": rollout_id, **_means("rollout/raw_reward", "rollout/response_len/mean", path)}
        for rollout_id, path in sorted(self._evaluation.items()):
            yield {"eval/step": rollout_id, **_means("eval/dump", "eval/dump/response_len/mean", path)}

    def _rollout_samples(self, rollout_id: int) -> list[dict] | None:
        path = self._rollout.get(rollout_id)
        return None if path is None else _samples_of(path)


def _load(path: Path) -> dict:
    """A dump file's contents.

    Raises:
        UserError: it is no dump file, is damaged, or holds objects that are neither tensors, arrays nor plain values.
    """
    try:
        with torch.serialization.safe_globals(_NUMPY):
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's message advises to switch the protection off; say what it met instead.
        what = re.search(r"(?:GLOBAL|global|class) ([\w.]+)", str(error))
        reason = f"it holds {what[1]}, which is not data" if what else "not a file that torch.save wrote"
        raise UserError(f"{path} is not read: {reason}; give a dump that slime wrote itself") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, IndexError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} cannot be read ({reason}); it is damaged or not a file of slime's dump") from None
    if not isinstance(contents, dict):
        raise UserError(f"{path} holds a {type(contents).__name__}, not a dump of slime's")
    version = contents.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} has format_version {version}; this slime-fipo reads {FORMAT_VERSION} (slime main 624b824a) and the"
            " files of v0.3.0 and v0.3.1"
        )
    return contents


def _samples_of(path: Path) -> list[dict]:
    samples = _load(path).get("samples")
    if not isinstance(samples, list) or not all(isinstance(sample, dict) for sample in samples):
        raise UserError(f"{path} holds no samples; it is not a file of slime's dump")
    return samples


def _merged_samples(path: Path, contents: dict) -> tuple[list[_Sample], list | None]:
    """Of slime main's one file: samples in rollout order, CP already undone."""
    try:
        steps = {}
        for shard in contents["dp_shards"]:
            for local, step in _steps(shard).items():
                steps[shard["partition"][local]] = step
        samples = [
            _Sample(
                position=sample["rollout_position"],
                step=steps[sample["rollout_position"]],
                tokens=_array(sample["tokens"], np.int32),
                response_length=int(sample["response_lengths"]),
                loss_mask=_array(sample["loss_masks"], np.float32) != 0,
                values=_whole_values(path, sample),
                present=np.ones(int(sample["response_lengths"]), dtype=bool),
            )
            for sample in contents["samples"]
        ]
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(f"{path} lacks {error}; it is not a file of slime's dump, or of another version") from None
    return samples, contents.get("raw_reward")


_VALUES = ("log_probs", "rollout_log_probs", "advantages")


def _whole_values(path: Path, sample: dict) -> dict[str, np.ndarray]:
    values = {name: _array(sample[name], np.float32) for name in _VALUES if sample.get(name) is not None}
    for name, array in values.items():
        if len(array) != int(sample["response_lengths"]):
            raise UserError(
                f"{path}: {name} of the response at position {sample['rollout_position']} has {len(array)} entries, the"
                f" response {sample['response_lengths']}; the file is damaged"
            )
    return values


def _rank_samples(
    paths: list[Path], contents: list[dict], rollout: list[dict] | None
) -> tuple[list[_Sample], list | None]:
    """Of v0.3's files: ranks with the same samples are tensor- and context-parallel copies of one another."""
    by_samples = defaultdict(dict)
    for path, content in zip(paths, contents, strict=True):
        try:
            data = content["rollout_data"]
            if data.get("advantages") is not None or len(paths) == 1:  # only the last pipeline stage has them
                by_samples[tuple(data["sample_indices"])][int(content["rank"])] = data
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} lacks {error}; it is not a file of slime's dump, or of another version") from None
    order = [sample["index"] for sample in rollout] if rollout is not None else sorted(i for k in by_samples for i in k)
    position_of = {index: position for position, index in enumerate(order)}
    copies_each = max(map(len, by_samples.values()))
    samples, raw_rewards = [], None
    for indices, copies in by_samples.items():
        # Ranks are numbered with tensor parallelism innermost, then context parallelism, then data parallelism.
        shards = {rank % copies_each: data for rank, data in copies.items()}
        data = next(iter(shards.values()))
        cp_size = _cp_size(paths[0].parent, shards, copies_each)
        raw_rewards = data.get("raw_reward", raw_rewards)
        steps = _steps(data)
        for local, index in enumerate(indices):
            response = int(data["response_lengths"][local])
            values = {name: np.zeros(response, dtype=np.float32) for name in _VALUES if data.get(name) is not None}
            present = np.zeros(response, dtype=bool)
            for copy, shard in shards.items():
                at = 0
                for start, end in _spans(data, local, cp_size, copy * cp_size // copies_each):
                    present[start:end] = True
                    for name, whole in values.items():
                        whole[start:end] = _array(shard[name][local], np.float32)[at : at + end - start]
                    at += end - start
            samples.append(
                _Sample(
                    position=position_of[index],
                    step=steps[local],
                    tokens=_array(data["tokens"][local], np.int32),
                    response_length=response,
                    loss_mask=_array(data["loss_masks"][local], np.float32) != 0,
                    values=values,
                    present=present,
                )
            )
    return sorted(samples, key=lambda sample: sample.position), raw_rewards


def _cp_size(folder: Path, shards: dict[int, dict], copies: int) -> int:
    """How many context-parallel ranks are among ``copies`` ranks, of which ``shards`` are there.

    Raises:
        UserError: no number explains them.
    """
    for cp_size in (n for n in range(1, copies + 1) if copies % n == 0):
        if all(
            len(_array(values, np.float32)) == sum(b - a for a, b in _spans(data, i, cp_size, copy * cp_size // copies))
            for copy, data in shards.items()
            for i, values in enumerate(data["advantages"])
        ):
            return cp_size
    raise UserError(
        f"{folder}: the ranks' slices do not make up whole responses; files of context-parallel ranks are missing for"
        " every data-parallel rank, or the files are of different runs"
    )


def _spans(data: dict, local: int, cp_size: int, rank: int) -> list[tuple[int, int]]:
    total, response = int(data["total_lengths"][local]), int(data["response_lengths"][local])
    padded = int(data["max_seq_lens"][local]) if data.get("max_seq_lens") else total  # v0.3.0's bshd layout
    return zigzag_spans(total, response, padded, cp_size, rank)


def zigzag_spans(total: int, response: int, padded: int, cp_size: int, rank: int) -> list[tuple[int, int]]:
    """Ranges of response tokens that a context-parallel rank holds: chunks rank and 2n − 1 − rank of the sequence.

    Args:
        total, response: tokens of the whole sequence and of its response.
        padded: length that is cut into chunks, ``total`` unless sequences are padded to one length.
    """
    edges = chunk_edges(total, response, -(-padded // (2 * cp_size)), cp_size)
    return [(edges[chunk], edges[chunk + 1]) for chunk in own_chunks(rank, cp_size)]


def _steps(data: dict) -> dict[int, int]:
    """Local sample -> optimizer step, from the micro-batches' schedule."""
    steps, microbatches = {}, iter(data["micro_batch_indices"])
    for step, count in enumerate(data["num_microbatches"]):
        for _ in range(count):
            for local in next(microbatches):
                steps[local] = step
    return steps


def _by_step(samples: list[_Sample]) -> dict[int, list[_Sample]]:
    steps = defaultdict(list)
    for sample in samples:
        steps[sample.step].append(sample)
    return steps


def _groups(rollout: list[dict] | None, count: int) -> list[int]:
    """Group of each position, numbered in the rollout's order; without ``rollout_data`` every response by itself."""
    if rollout is None:
        return list(range(count))
    numbers: dict = {}
    return [numbers.setdefault(sample.get("group_index"), len(numbers)) for sample in rollout]


def _reward(position: int, rollout: list[dict] | None, raw_rewards: Sequence | None) -> float:
    candidates = []
    if raw_rewards is not None and position < len(raw_rewards):
        candidates.append(raw_rewards[position])
    if rollout is not None:
        candidates.append(rollout[position].get("reward"))
    return next((value for value in map(_number, candidates) if value is not None), float("nan"))


def _number(reward) -> float | None:
    """A reward as one number: its own, or ``acc`` or ``score`` of a dictionary."""
    if isinstance(reward, dict):
        reward = next((reward[key] for key in ("acc", "score") if key in reward), None)
    return float(reward) if isinstance(reward, (int, float, np.number, torch.Tensor)) else None


def _means(reward_name: str, length_name: str, path: Path) -> dict[str, float]:
    samples = _samples_of(path)
    rewards = [r for r in (_number(sample.get("reward")) for sample in samples) if r is not None]
    lengths = [sample["response_length"] for sample in samples if "response_length" in sample]
    means = {reward_name: rewards, length_name: lengths}
    return {name: float(np.mean(values)) for name, values in means.items() if values}


def _array(value, dtype) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = value.detach().to(torch.float32 if dtype is np.float32 else torch.int64).numpy()
    return np.asarray(value, dtype=dtype).reshape(-1)
