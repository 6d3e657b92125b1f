"""What ``slime-fipo report`` is given: folders of several kinds, each read into runs of one shape.

A kind is a test of what stands in the folder and a reader; nothing else knows where a run came from.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..algorithm import FipoConfig
from ..errors import UserError
from ..records import RecordSet, TokenRecord, read_records
from ..records.slime_dump import SlimeDump, is_dump
from ..records.store import is_record_folder
from .metrics import METRICS_FILE, read_metrics

RECORDS = "records"  # in a run directory


@dataclass
class Run:
    """One training run, or what is there of it.

    Args:
        name: how the page calls it.
        rows: rows of metrics, each with a step axis (``rollout/step``, ``eval/step``); empty if there are none.
        records: token records, in order of rollout, step and position.
        missing: one sentence for each thing that should be there and is not.
        notes: sentences about how the run was read.
        unread: ids of rollouts whose records are there and were left out.
    """

    name: str
    rows: list[dict] = field(default_factory=list)
    records: list[TokenRecord] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unread: list[int] = field(default_factory=list)

    @property
    def rollout_ids(self) -> set[int]:
        """Rollouts of which there are records, read or not."""
        return {record.header.rollout_id for record in self.records} | set(self.unread)


@dataclass(frozen=True)
class DumpOptions:
    """What slime's dumps do not say, and which of their many rollouts to read.

    Args:
        config: the run's FIPO settings; None: the defaults.
        use_rollout_logprobs: as in :class:`SlimeDump`.
        rollouts: ids; empty: the first and the newest.
    """

    config: FipoConfig | None = None
    use_rollout_logprobs: bool | None = None
    rollouts: tuple[int, ...] = ()

    def check(self, kinds: Collection[str]) -> None:
        """Refuse what only a dump needs to be told, where ``kinds`` of folders have none.

        Raises:
            UserError: names the flag.
        """
        given = {"--fipo-preset": self.config, "--use-rollout-logprobs": self.use_rollout_logprobs}
        flag = next((flag for flag, value in given.items() if value is not None), None)
        if flag is not None and DUMP.name not in kinds:
            raise UserError(
                f"{flag} has no effect: it describes {DUMP.name}, and no path is one; records say their own settings."
                " Drop it"
            )


@dataclass(frozen=True)
class Kind:
    """A kind of folder: what it is called, how it is known, how it is read."""

    name: str
    matches: Callable[[Path], bool]
    read: Callable[[Path, DumpOptions], list[Run]]


def _is_run(path: Path) -> bool:
    return (path / METRICS_FILE).is_file()


def _read_run(path: Path, _: DumpOptions, name: str | None = None) -> list[Run]:
    records = path / RECORDS
    found = read_records(records) if is_record_folder(records) else RecordSet()
    return [Run(name or path.resolve().name, read_metrics(path / METRICS_FILE), found.records, found.missing)]


def _is_comparison(path: Path) -> bool:
    return any(metrics.parent.name != "base" for metrics in path.glob(f"seed-*/*/{METRICS_FILE}"))


def _read_comparison(path: Path, options: DumpOptions) -> list[Run]:
    """Every arm of every seed; the base models are where the arms begin, and have no rollouts."""
    runs = []
    for metrics in sorted(path.glob(f"seed-*/*/{METRICS_FILE}")):
        if metrics.parent.name != "base":
            runs += _read_run(metrics.parent, options, f"{metrics.parent.name}, {metrics.parent.parent.name}")
    if not (path / "compare.json").exists():
        runs[0].missing.append(f"{path}: compare.json is missing, so the comparison has not finished")
    return runs


def _read_records(path: Path, _: DumpOptions) -> list[Run]:
    found = read_records(path)
    return [Run(path.resolve().name, [], found.records, found.missing)]


def _read_dump(path: Path, options: DumpOptions) -> list[Run]:
    dump = SlimeDump(path, options.config or FipoConfig(), options.use_rollout_logprobs)
    there = dump.trained_ids
    ids = [i for i in there if i in options.rollouts] if options.rollouts else sorted({*there[:1], *there[-1:]})
    unread = [i for i in there if i not in ids]
    run = Run(path.resolve().name, list(dump.trend()), missing=dump.missing(), unread=unread)
    for rollout in ids:
        found = dump.read(rollout)
        run.records += found.records
        run.missing += found.missing
    if unread:
        shown = ", ".join(map(str, ids)) or "none"
        run.notes.append(f"{path}: of {len(there)} dumped rollouts {shown} are read; --rollout chooses others.")
    if options.use_rollout_logprobs is None:
        run.notes.append(
            f"{path}: a dump does not say whether the run had --use-rollout-logprobs. Give that flag, and Δ, F and f"
            " are rebuilt; --no-use-rollout-logprobs gives the mismatch at every step."
        )
    elif options.use_rollout_logprobs:
        run.notes.append(
            f"{path}: a dump does not say the FIPO settings. F and f are rebuilt with those of --fipo-preset, or else"
            " the defaults."
        )
    return [run]


DUMP = Kind("slime's --dump-details folder (train_data/, rollout_data/)", is_dump, _read_dump)
KINDS = (
    Kind("a run directory of slime-fipo local (metrics.jsonl)", _is_run, _read_run),
    Kind("slime-fipo compare (seed-*/)", _is_comparison, _read_comparison),
    Kind("token records of --fipo-record (rollout_*/step_*.safetensors)", is_record_folder, _read_records),
    DUMP,
)


def read_inputs(paths: Sequence[Path], options: DumpOptions = DumpOptions()) -> list[Run]:
    """The runs in ``paths``; names that clash are told apart by their folder.

    Raises:
        UserError: a path is not a folder, of no kind, or one of its files is damaged, or an option has no effect on
            them; the message names it.
    """
    found = [(path, _kind(path)) for path in paths]
    options.check({kind.name for _, kind in found})
    runs = []
    for path, kind in found:
        new = kind.read(path, options)
        for run in new:
            _check_settings(path, run)
        if {run.name for run in new} & {run.name for run in runs}:
            for run in new:
                run.name = f"{run.name} ({path})"
        runs += new
    return runs


def _kind(path: Path) -> Kind:
    if not path.exists():
        raise UserError(f"{path} does not exist; give {_kinds()}")
    if not path.is_dir():
        raise UserError(f"{path} is not a folder; give {_kinds()}")
    kind = next((kind for kind in KINDS if kind.matches(path)), None)
    if kind is None:
        raise UserError(f"{path} is none of these: {_kinds()}")
    return kind


def _check_settings(path: Path, run: Run) -> None:
    """Records carry the settings of whoever wrote them, perhaps a stranger or another version."""
    for config in {repr(record.header.config): record.header.config for record in run.records}.values():
        try:
            FipoConfig(**config)
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}: the settings in its records are not ones of this slime-fipo ({error})") from None


def _kinds() -> str:
    *most, last = (kind.name for kind in KINDS)
    return f"{', '.join(most)}, or {last}"
