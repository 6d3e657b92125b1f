"""What a rehearsal saw, one line for each thing, each right, wrong or not seen."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from ..algorithm import FipoConfig
from ..check.command import Command
from ..errors import UserError
from ..records import read_records
from .metrics import read_scalars, read_wandb
from .reward_trial import FORMS, chosen_form
from .shrink import NUM_ROLLOUT
from .watch import events

MOST_DIFFERENCE = 0.02  # mean |Δ log-prob| of the engines; bfloat16 gives 0.003 to 0.007 on these models
_RAY_PREFIX = re.compile(r"^(?:\x1b\[[0-9;]*m)*\(.*?\)(?:\x1b\[[0-9;]*m)*\s?")
_LOG_ERROR = re.compile(r"^((?:[\w.]+\.)?\w*(?:Error|Exception|Interrupt)\b.*)$")


@dataclass(frozen=True)
class Line:
    """``ok``: None where there was nothing to judge."""

    what: str
    ok: bool | None
    text: str


@dataclass
class Seen:
    """What one run left: its folder, exit status and log."""

    folder: Path
    status: int | None
    log: Path
    events: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, folder: Path, status: int | None, log: Path) -> Seen:
        return cls(folder, status, log, list(events(folder / "watch")))

    @cached_property
    def scalars(self) -> dict[str, list[tuple[int, float]]]:
        return read_scalars(self.folder / "tensorboard")

    def error(self) -> str:
        """Why the run stopped, with the place in the log; empty if it did not."""
        if self.status == 0:
            return ""
        for event in self.events:
            if event.get("error"):
                raised = "raised " if event["kind"] == "hook" else ""
                return f"{event.get('path', event.get('name'))} {raised}{event['error']}"
        if self.status is None:
            return f"it did not end in time; the log's end is in {self.log}"
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        found = ((n, _LOG_ERROR.match(_RAY_PREFIX.sub("", line))) for n, line in enumerate(lines, 1))
        errors = [(n, match[1]) for n, match in found if match]
        # Ray wraps an error of a worker in its own; the first that is not Ray's says more.
        own = [each for each in errors if not each[1].startswith(("ray.", "RayTaskError", "ActorDiedError"))]
        if own or errors:
            number, text = (own or errors)[0]
            if ":" not in text:  # a bare assert: its line says more
                code = next((lines[n] for n in range(number - 2, 0, -1) if re.search(r"\w", lines[n])), "")
                text = f"{text} at `{_RAY_PREFIX.sub('', code).strip()}`"
            return f"{text[:400]} ({self.log}:{number})"
        return f"exit status {self.status} ({self.log})"


def judge(command: Command, config: FipoConfig | None, first: Seen, second: Seen | None, steps: int) -> Iterator[Line]:
    """The lines about two runs.

    Args:
        config: FIPO's settings; None without FIPO.
        first: three rollouts from the start.
        second: one more from their checkpoint; None if the first did not end well.
        steps: optimizer steps per rollout, in the rehearsal.
    """
    args = command.args
    if error := first.error():
        yield Line("training", False, error)
    else:
        yield Line("training", True, f"{NUM_ROLLOUT} rollouts of {steps} optimizer steps")
    yield from _rewards(first)
    if args.dynamic_sampling_filter_path is not None:
        yield _filter(args.dynamic_sampling_filter_path, first)
    yield from _engines(first, config, steps)
    if config is not None:
        yield _weights(first, steps)
    yield _tracker(command, first)
    if config is not None and getattr(args, "fipo_record", None):
        yield _records(first)
    if args.eval_interval is not None:
        yield _evaluation(command, first)
    yield _checkpoint(first, second, steps)
    yield from _hooks(command, first, second)


def _unseen(run: Seen, what: str, text: str) -> Line:
    """Wrong in a run that went to its end; one that stopped may not have got there."""
    return Line(what, False if run.status == 0 else None, text)


# -- reward and filter --


def _rewards(seen: Seen) -> Iterator[Line]:
    tried = [event for event in seen.events if event["kind"] == "reward"]
    if not tried:
        yield Line("reward", None, "slime called none")
    for event in tried:
        ok, text = _reward(event)
        yield Line("reward", ok, f"{event['name']} {text}")


def _reward(event: dict[str, Any]) -> tuple[bool | None, str]:
    label, values, asked = event["label"], event["values"], event["asked"]
    if event["error"]:
        return False, event["error"]
    if label is None:
        return None, "was not tried: the samples have no label (--label-key)"
    plain = values[""]
    read = [form for form in FORMS if values.get(form, plain) > plain]
    wanted = " or ".join(_example(form, label) for form in asked)
    if not asked:
        if read:
            return True, f"reads {_example(read[0], label)}; the prompts ask for no form that is known here"
    elif refused := [form for form in asked if form not in read]:
        if len(refused) == len(asked):
            also = f"; it reads {_example(chosen_form(asked, values), label)}" if read else ""
            return False, f"gives {values[asked[0]]:g} to {wanted}, which is what your prompts ask for{also}"
        return True, f"gives {max(values[form] for form in asked):g} to one of {wanted}, which your prompts ask for"
    else:
        return True, f"gives {values[asked[0]]:g} to {wanted}, which your prompts ask for, and {plain:g} without"
    if len(label) > 60 or "\n" in label:
        return None, "cannot be tried with a label of this kind"
    return False, f"gives {plain:g} to every form of the right answer {label!r} that was tried: {', '.join(FORMS)}"


def _example(form: str, label: str) -> str:
    return f"'{FORMS[form].format(label).strip()}'"


def _filter(path: str, seen: Seen) -> Line:
    what, filter_ = "dynamic sampling", f"--dynamic-sampling-filter-path {path}"
    groups = [event for event in seen.events if event["kind"] == "filter" and event["path"] == path]
    if not groups:
        return _unseen(seen, what, f"{filter_} never judged a group")
    if returned := [event["returned"] for event in groups if event["returned"]]:
        taken = "True, so that every group is kept" if any(event["keep"] for event in groups) else "False"
        return Line(
            what,
            False,
            f"{filter_} returned {returned[0]}, which slime takes for {taken}; return"
            " slime.rollout.filter_hub.base_types.DynamicFilterOutput(keep=…)",
        )
    varied: Counter[bool] = Counter()
    equal: Counter[bool] = Counter()
    for event in groups:
        (varied if len(set(event["rewards"])) > 1 else equal)[event["keep"]] += 1
    text = (
        f"{filter_} kept {varied[True]} of {varied.total()} groups with different rewards, dropped {equal[False]} of"
        f" {equal.total()} with equal ones"
    )
    if varied.total() == 0:
        return Line(what, False, f"{text}: rewards never differ within a group, so nothing can be learned")
    return Line(what, varied[True] > 0 and not (equal.total() and equal[True] == equal.total()), text)


# -- numbers --


def _at(seen: Seen, metric: str, steps: int, first: bool) -> list[float]:
    """A train metric at each rollout's first step, or at the others."""
    values = dict(seen.scalars.get(metric, ()))
    return [value for step, value in sorted(values.items()) if (step % steps == 0) == first]


def _engines(seen: Seen, config: FipoConfig | None, steps: int) -> Iterator[Line]:
    what = "log-probs of SGLang and Megatron"
    differences = _at(seen, "train/train_rollout_logprob_abs_diff", steps, first=True)
    if not differences:
        if seen.status == 0:
            yield Line(what, None, "slime logged no difference")
        return
    worst = max(differences)
    text = f"differ by {worst:.4f} (mean |Δ| at first steps)"
    if config is not None:
        gamma = 2 ** (-1 / config.decay_rate)
        noise = worst / math.sqrt(2 / math.pi) / math.sqrt(1 - gamma**2)
        text += f": noise of {noise:.2g} in Future-KL at a half-life of {config.decay_rate:g} tokens"
    if worst > MOST_DIFFERENCE:
        text += "; MODEL_ARGS may not be this checkpoint's model, or Megatron pads the vocabulary"
    yield Line(what, worst <= MOST_DIFFERENCE, text)


def _weights(seen: Seen, steps: int) -> Line:
    what = "FIPO's influence weights"
    if steps < 2:  # --fipo-allow-single-step: the old log-probs are of older weights, but for the first rollout
        moved = _at(seen, "train/fipo/influence_deviation", steps, first=True)[1:]
        ok, where = any(moved), "with one step per rollout"
    else:
        moved = _at(seen, "train/fipo/influence_deviation", steps, first=False)
        ok, where = all(moved), "at second steps"
    if not moved:
        return _unseen(seen, what, "no second optimizer step was logged")
    return Line(what, ok, f"mean |f − 1| {fmean(moved):.4f} {where}" + ("" if ok else ": they did not move"))


def _tracker(command: Command, seen: Seen) -> Line:
    kinds = Counter(name.partition("/")[0] for name in seen.scalars)
    counts = ", ".join(f"{count} {kind}/" for kind, count in sorted(kinds.items()))
    if not kinds.get("train"):
        return _unseen(seen, "tracker", f"no train/ metric arrived ({counts or 'nothing did'})")
    own = command.args.use_wandb or "--use-tensorboard" in command.arguments
    text = f"{counts} metrics arrived"
    if command.args.use_wandb:
        lost = seen.scalars.keys() - read_wandb(seen.folder / "wandb").keys()
        if lost:
            return Line("tracker", False, f"{text} in TensorBoard, but {_some(sorted(lost))} not in wandb")
        text += ", in wandb too (offline)"
    elif not own:
        text += "; the command has no tracker (--use-wandb or --use-tensorboard)"
    return Line("tracker", True, text)


def _records(seen: Seen) -> Line:
    try:
        found = read_records(seen.folder / "records")
    except UserError as error:
        return _unseen(seen, "token records", str(error))
    steps = {(record.header.rollout_id, record.header.step_id) for record in found.records}
    text = f"{len(found.records)} responses of {len(steps)} steps written and read"
    return Line("token records", not found.missing, "; ".join([text, *found.missing[:1]]))


def _some(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _evaluation(command: Command, seen: Seen) -> Line:
    logged = {name: values[-1][1] for name, values in seen.scalars.items() if name.startswith("eval/")}
    missing = [each.name for each in command.eval_datasets if not any(each.name in name for name in logged)]
    if missing or not logged:
        return _unseen(seen, "evaluation", f"nothing was logged of {', '.join(missing) or 'any benchmark'}")
    means = ", ".join(f"{name} {logged[name]:.3g}" for name in sorted(logged)[:3])
    return Line("evaluation", True, f"{means}{' …' if len(logged) > 3 else ''} (half of the answers made right)")


def _checkpoint(first: Seen, second: Seen | None, steps: int) -> Line:
    if not (first.folder / "checkpoint" / "latest_checkpointed_iteration.txt").is_file():
        return _unseen(first, "checkpoint", "none was written")
    if second is None:
        return Line("checkpoint", None, "written; not resumed, since the run before it did not end well")
    if error := second.error():
        return Line("checkpoint", False, f"written, and not resumed: {error}")
    reached = sorted({step for values in second.scalars.values() for step, _ in values})
    taken = sorted(step for step, _ in second.scalars.get("train/loss", second.scalars.get("train/grad_norm", ())))
    expected = list(range(NUM_ROLLOUT * steps, (NUM_ROLLOUT + 1) * steps))
    if taken != expected:
        return Line("checkpoint", False, f"resumed at step {(taken or reached or ['none'])[0]}, not at {expected[0]}")
    return Line("checkpoint", True, f"written, and a new run continued from it at step {expected[0]}")


# -- the user's code --


def hook_flags(command: Command) -> dict[str, str]:
    """Import path -> the flag that names it, for everything that slime loads by path."""
    given: dict[str, list[str]] = {}  # a flag that is given twice has its last values
    words = list(command.arguments)
    for i, word in enumerate(words):
        flag, _, value = word.partition("=")
        if not re.fullmatch(r"--[\w-]+-path", flag):
            continue
        given[flag] = [value] if value else []
        for following in words[i + 1 :]:
            if value or following.startswith("--"):
                break
            given[flag].append(following)
    found: dict[str, str] = {}
    for flag, paths in given.items():
        for path in paths:
            if re.fullmatch(r"[A-Za-z_][\w.]*\.\w+", path) and not path.endswith((".yaml", ".yml", ".json", ".py")):
                found[path] = flag
    for name, value in vars(command.args).items():  # those of --custom-config-path
        if name.endswith("_path") and isinstance(value, str) and re.fullmatch(r"[A-Za-z_]\w*(\.\w+)+", value):
            found.setdefault(value, f"--{name.replace('_', '-')}")
    for dataset in command.eval_datasets:
        if dataset.custom_rm_path:
            found.setdefault(dataset.custom_rm_path, f"custom_rm_path of {dataset.name}")
    return {path: flag for path, flag in found.items() if not path.endswith((".yaml", ".yml"))}


def _hooks(command: Command, first: Seen, second: Seen | None) -> Iterator[Line]:
    calls: Counter[str] = Counter()
    loaded: set[str] = set()
    errors: dict[str, list[str]] = defaultdict(list)
    for event in [*first.events, *(second.events if second else ())]:
        if event["kind"] == "loaded":
            loaded.add(event["path"])
        if event["kind"] == "hook":
            if event.get("error"):
                errors[event["path"]].append(event["error"])
            else:
                calls[event["path"]] += 1
    for path, flag in hook_flags(command).items():
        if errors[path]:
            yield Line(flag, False, f"{path} raised {errors[path][0]}")
        elif calls[path]:
            yield Line(flag, True, f"{path} was called {calls[path]} times")
        elif path in loaded:
            yield Line(flag, None, f"{path} was loaded, and never called")
        else:
            yield Line(flag, None, f"{path} was never loaded")
