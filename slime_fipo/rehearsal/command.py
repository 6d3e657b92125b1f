"""``slime-fipo rehearse``: the user's train command, shrunk, through the real slime, Megatron-LM, SGLang and Ray.

Three rollouts, then one more from their checkpoint; what was seen on the way is the verdict.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ..check.command import Command, parse_command
from ..check.file_rules import checkpoints, reference_model
from ..check.finding import Finding
from ..check.preflight import check_command, merged
from ..check.slime_parser import Installation as Checkouts
from ..check.slime_parser import Verdict, ask
from ..errors import UserError
from . import ports
from .cluster import MARK, SITE, Rehearsal, check_machine
from .hook_imports import import_errors
from .installation import REPOSITORY, Installation, find
from .prompts import PromptLengths, prompt_lengths
from .shrink import Shrunk, resume, shrink
from .small_model import shrink_checkpoint
from .verdict import Line, Seen, hook_flags, judge
from .watch import FOLDER

MOST_OVER_LIMIT = 0.1  # share of prompts longer than the limit, which slime drops without a word
TIME_LIMIT_S = 1800.0


def main(
    tokens: Sequence[str],
    console: Console | None = None,
    *,
    slime_root: Path | None = None,
    megatron_root: Path | None = None,
    time_limit_s: float = TIME_LIMIT_S,
) -> int:
    """Rehearse a train command and print the verdict.

    Args:
        tokens: the train command; all of ``ray job submit … --`` may stand before it.
        time_limit_s: for each of the two runs.

    Returns:
        0 if nothing is wrong, 1 if something is.

    Raises:
        UserError: the command cannot be read, or something that a rehearsal needs is missing.
    """
    console = console or Console(highlight=False)
    tokens = list(tokens)[1:] if list(tokens)[:1] == ["--"] else list(tokens)
    if not tokens:
        raise UserError("no train command; write it after --, as in: slime-fipo rehearse -- python3 train.py …")
    command = parse_command(tokens)
    check_machine()
    installation = find(command, slime_root, megatron_root)
    command = replace(command, slime_root=installation.slime)
    folder = Path(tempfile.mkdtemp(prefix="slime-fipo-rehearse-"))
    try:
        lines = _rehearse(command, tokens, installation, folder, console, time_limit_s)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    console.print(_verdict_table(lines))
    wrong = sum(line.ok is False for line in lines)
    if wrong:
        _keep_only_logs(folder)
        console.print(f"{wrong} wrong. Logs: {folder}", markup=False, soft_wrap=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)
        console.print("nothing wrong")
    return int(wrong > 0)


def _rehearse(
    command: Command, tokens: list[str], installation: Installation, folder: Path, console: Console, time_limit_s: float
) -> list[Line]:
    environment = _job_environment(tokens)
    paths = [Path(each) for each in environment.pop("PYTHONPATH", "").split(os.pathsep) if each]
    with _Status(console) as status, ThreadPoolExecutor(2) as pool:
        # slime's parser takes 10 to 20 seconds in a process of its own.
        status("slime's parser reads the command; prompts are tokenized")
        # The stand-ins want to know a range of ports, of which nothing here opens one.
        stand_ins = {MARK: str(folder), ports.VARIABLE: str(ports.RANGES.start)}
        checkouts = Checkouts(installation.slime, installation.megatron, stand_ins=SITE, environment=stand_ins)
        asked = pool.submit(ask, command, checkouts)
        roots = [SITE, REPOSITORY, installation.slime, installation.megatron, *paths]
        python_path = os.pathsep.join([*map(str, roots), os.environ.get("PYTHONPATH", "")])
        hooks = hook_flags(command)
        imported = pool.submit(
            import_errors, hooks, {**os.environ, **environment, **stand_ins, "PYTHONPATH": python_path}, folder
        )
        findings, config = check_command(command)
        lines = _prompts(command, findings)
        lines = [*_settings(command, findings, asked), *lines]
        lines += [Line(hooks[path], False, f"{path}: {error}") for path, error in imported.result().items()]
        if any(line.ok is False for line in lines):
            return [*lines, Line("training", False, "not begun; first fix what is wrong above")]
        status("a small model of the same family")
        model = shrink_checkpoint(Path(command.args.hf_checkpoint), folder / "model")
        shrunk = shrink(command, model, folder)
        console.print(_changes_table(shrunk))
        if model.stand_in:
            lines.append(Line("model", None, f"a dense Qwen3 in place of yours: {model.stand_in}"))
        first = second = None
        with Rehearsal(
            installation.slime,
            installation.megatron,
            gpus=shrunk.gpus,
            log=folder / "ray.log",
            environment={**environment, **_here(folder), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"},
            paths=paths,
        ) as rehearsal:
            run = _Run(command, installation, rehearsal, status, folder / "now", time_limit_s)
            first = run(folder, "train", shrunk.arguments)
            if first.status == 0:
                second = run(folder / "resume", "resume", resume(shrunk, folder))
        status("reading what was seen")
        return [*lines, *judge(command, config, first, second, shrunk.steps_per_rollout)]


# -- before slime starts --


def _settings(command: Command, findings: list[Finding], asked: Future[Verdict]) -> list[Line]:
    """What ``slime-fipo check`` and slime's own parser say. Checkpoints are not read: a rehearsal makes its own."""
    of_checkpoints = {finding for rule in (checkpoints, reference_model) for finding in rule(command, None)}
    verdict = asked.result()
    # What slime's parser ignores is a warning of `check`, which may be of another version; a rehearsal asks this one.
    of_slime = set(verdict.findings)
    wrong = [
        f.message
        for f in merged(findings, verdict)
        if (f.severity == "error" or f in of_slime) and f not in of_checkpoints
    ]
    warnings = sum(f.severity == "warning" for f in merged(findings, verdict))
    text = verdict.summary + (f"; slime-fipo check has {warnings} warnings" if warnings else "")
    return [Line("command", False, message) for message in wrong] or [Line("command", verdict.judged or None, text)]


def _prompts(command: Command, findings: list[Finding]) -> list[Line]:
    args = command.args
    unreadable = any(f.severity == "error" and re.match("--(prompt-data|input-key) ", f.message) for f in findings)
    if unreadable or args.prompt_data is None or args.hf_checkpoint is None:
        return []  # the rules say so
    try:
        lengths = prompt_lengths(args)
    except UserError as error:
        return [Line("prompts", False, str(error))]
    return [Line("prompts", *_judge_lengths(lengths, args.rollout_max_prompt_len))]


def _judge_lengths(lengths: PromptLengths, limit: int | None) -> tuple[bool, str]:
    count = f"{'all' if lengths.all_rows else 'the first'} {len(lengths.tokens)} prompts"
    over = lengths.over(limit)
    text = f"{count} tokenized, the longest has {max(lengths.tokens)} tokens"
    if limit is None:
        return True, f"{text} (no --rollout-max-prompt-len)"
    if over:
        fix = "raise it" if over == len(lengths.tokens) else "raise it if you want them"
        text += f", and --rollout-max-prompt-len is {limit}: slime leaves out {over} that are longer; {fix}"
    else:
        text += f" of --rollout-max-prompt-len {limit}"
    return over <= MOST_OVER_LIMIT * len(lengths.tokens), text


def _job_environment(tokens: list[str]) -> dict[str, str]:
    """``env_vars`` of ``ray job submit --runtime-env-json``, as texts."""
    for i, token in enumerate(tokens[: tokens.index("--")] if "--" in tokens else []):
        flag, _, value = token.partition("=")
        if flag != "--runtime-env-json":
            continue
        try:
            variables = json.loads(value or tokens[i + 1]).get("env_vars") or {}
            return {str(name): str(text) for name, text in variables.items() if not name.startswith("NCCL_")}
        except (ValueError, AttributeError):
            raise UserError("--runtime-env-json is not a JSON object; fix its quotes") from None
    return {}


# -- the runs --


def _here(folder: Path) -> dict[str, str]:
    """Where every process writes what it saw. Ray's workers have the environment that Ray was started with, so it
    names a link, which points to the folder of the run that is on."""
    return {FOLDER: str(folder / "now" / "watch"), "TENSORBOARD_DIR": str(folder / "now" / "tensorboard")}


class _Run:
    """Runs train commands inside one rehearsal and says how far each is."""

    def __init__(
        self,
        command: Command,
        installation: Installation,
        rehearsal: Rehearsal,
        status: _Status,
        now: Path,
        time_limit_s: float,
    ) -> None:
        self._now = now
        script = Path(command.script or "train.py")
        # Given as arguments only, or for another machine's folders: slime's own of that name.
        self._script = script if script.is_file() else installation.slime / script.name
        self._launcher = ["-m", "slime_fipo"] if command.launcher else []
        self._rehearsal, self._status, self._time_limit_s = rehearsal, status, time_limit_s

    def __call__(self, folder: Path, name: str, arguments: list[str]) -> Seen:
        (folder / "watch").mkdir(parents=True)
        self._now.unlink(missing_ok=True)
        self._now.symlink_to(folder)
        log = folder / f"{name}.log"
        done = threading.Event()
        follower = threading.Thread(target=_follow, args=(log, name, self._status, done))
        follower.start()
        try:
            train = [sys.executable, *self._launcher, self._script, *arguments]
            status = self._rehearsal.run(train, log, self._time_limit_s)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            done.set()
            follower.join()
        return Seen.of(folder, status, log)


# Line of the log -> what is going on.
_STAGES = (
    (re.compile(r"Launch HttpServerEngineAdapter"), "SGLang starts"),
    (re.compile(r"Rollout generation: .*?(\d+)/(\d+)"), "samples: {} of {}"),
    (re.compile(r"First rollout sample"), "the reward was called"),
    (re.compile(r"\bstep (\d+): \{"), "optimizer step {}"),
    (re.compile(r"Eval .*?(\d+)/(\d+)"), "evaluation: {} of {}"),
    (re.compile(r"(?:saving|saved) checkpoint", re.IGNORECASE), "checkpoint"),
    (re.compile(r"loading (?:distributed )?checkpoint", re.IGNORECASE), "the checkpoint is loaded"),
)


def _follow(log: Path, name: str, say: Callable[[str], None], done: threading.Event) -> None:
    """Say what the log's end is about until ``done``."""
    title = {"train": "training", "resume": "resuming from the checkpoint"}[name]
    say(f"{title}: slime starts")
    position = 0
    while not done.wait(0.5):
        if not log.exists():
            continue
        with log.open("rb") as file:
            file.seek(position)
            text = file.read().decode(errors="replace")
            position = file.tell()
        for line in re.split(r"[\r\n]", text):
            for pattern, stage in _STAGES:
                if match := pattern.search(line):
                    say(f"{title}: {stage.format(*match.groups())}")


class _Status:
    """One line that says what is going on: live on a terminal, a line for each new thing elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            SpinnerColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False), console=console,
            transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self._started, self._last = time.monotonic(), ""

    def __enter__(self) -> _Status:
        self._progress.__enter__()
        self._task = self._progress.add_task("")
        return self

    def __exit__(self, *error) -> None:
        self._progress.__exit__(*error)

    def __call__(self, text: str) -> None:
        self._progress.update(self._task, description=text)
        stage = re.sub(r"\d+", "", text)
        if not self._console.is_terminal and stage != self._last:
            self._console.print(f"{time.monotonic() - self._started:4.0f} s  {text}", markup=False, soft_wrap=True)
        self._last = stage


def _keep_only_logs(folder: Path) -> None:
    for name in ("model", "checkpoint", "weights", "dump"):
        shutil.rmtree(folder / name, ignore_errors=True)


# -- what is printed --


def _changes_table(shrunk: Shrunk) -> Table:
    title = "changed for the rehearsal; everything else is yours"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("what", "yours", "rehearsed"):
        table.add_column(column, overflow="fold")
    for change in shrunk.changes:
        table.add_row(*map(Text, (change.what, change.given, change.rehearsed)))
    return table


_MARKS = {True: ("✓", "green"), False: ("✗", "bold red"), None: ("–", "dim")}


def _verdict_table(lines: list[Line]) -> Table:
    table = Table(title="verdict", box=box.SIMPLE, show_header=False, title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for line in lines:
        mark, style = _MARKS[line.ok]
        table.add_row(Text(mark, style), Text(line.what), Text(line.text))
    return table
