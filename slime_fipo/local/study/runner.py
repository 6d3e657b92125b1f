"""Many runs of the embedded engine side by side, each in a process of its own.

A finished run is known by its ``summary.json``, which is written under a temporary name and renamed; it is not run
again. One that was interrupted continues from its newest checkpoint, so killing the study at any moment costs at most
a few rollouts. A run's process ends with the study's, however that ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path

import rich.progress
from rich.console import Console

from ...errors import UserError
from ..arguments import parse_arguments
from ..engine import run
from ..run_directory import RunDirectory

DEMO_STEPS_PER_ROLLOUT = 25  # steps of base training that take about as long as a rollout; for the time left


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        name: for people.
        save: its run directory.
        argv: flags of ``slime-fipo local``, ``--save`` included.
        after: run directory of the job that must have finished before.
    """

    name: str
    save: Path
    argv: tuple[str, ...]
    after: Path | None = None

    @property
    def work(self) -> float:
        """In rollouts."""
        args = parse_arguments(list(self.argv))
        return args.num_rollout + (0 if args.load else args.demo_steps / DEMO_STEPS_PER_ROLLOUT)

    def finished(self) -> bool:
        """Whether its directory holds a finished run.

        Raises:
            UserError: it does, of another configuration.
        """
        if not (self.save / "summary.json").exists():
            return False
        RunDirectory(str(self.save), parse_arguments(list(self.argv))).close()
        return True


def run_jobs(jobs: Sequence[Job], workers: int, console: Console) -> None:
    """Run what is not finished, at most ``workers`` at once and in this order as far as ``after`` lets them.

    Raises:
        UserError: a run failed; the others are stopped, and continue when the study is started again.
    """
    context = multiprocessing.get_context(
        "forkserver"
    )  # a run's fork has everything imported, and no other run's state
    context.set_forkserver_preload([__name__])
    finished = {job.save for job in jobs if job.finished()}
    pending = [job for job in jobs if job.save not in finished]
    running: dict[connection.Connection, tuple[Job, multiprocessing.process.BaseProcess]] = {}
    with StudyProgress(jobs, pending, console) as progress:
        try:
            while pending or running:
                for job in [job for job in pending if job.after is None or job.after in finished]:
                    if len(running) < workers:
                        pending.remove(job)
                        messages, process = _start(context, job)
                        running[messages] = job, process
                for messages in connection.wait(list(running)):
                    job, process = running[messages]
                    try:
                        kind, value = messages.recv()
                    except EOFError:
                        process.join()
                        if process.exitcode != 0:
                            raise UserError(f"{job.name} ended with exit code {process.exitcode}; {_AGAIN}") from None
                        del running[messages]
                        finished.add(job.save)
                        progress.finish(job)
                        continue
                    if kind == "error":
                        raise UserError(f"{job.name}: {value}")
                    progress.advance(job, value)
        finally:
            for _, process in running.values():
                process.kill()
                process.join()


_AGAIN = "the same command continues"


def _start(context, job: Job):
    receives, sends = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(job.argv, sends), name=job.name, daemon=True)
    process.start()
    sends.close()  # so that the run's end is the end of its messages
    return receives, process


class _Messages:
    """A run's :class:`~slime_fipo.local.progress.Progress` that tells the study's process how far it is."""

    def __init__(self, sends: connection.Connection):
        self.sends = sends

    def track(self, description: str, start: int, stop: int) -> Iterator[int]:
        units = 1 if description == "rollouts" else 1 / DEMO_STEPS_PER_ROLLOUT
        for number in range(start, stop):
            yield number
            self.sends.send(("done", (number + 1) * units))

    def show(self, state: str) -> None:
        """The bar of a study shows runs, not losses; those are in each run's ``metrics.jsonl``."""

    def say(self, message: str) -> None:
        """As :meth:`show`."""


def _work(argv: Sequence[str], sends: connection.Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the study's process, which ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        run(parse_arguments(list(argv)), _Messages(sends))
    except (UserError, OSError) as error:
        sends.send(("error", str(error)))


def _end_with_parent() -> None:
    connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


class StudyProgress:
    """A bar over all runs with the time left; a line per finished run where the output is a file or a pipe."""

    def __init__(self, jobs: Sequence[Job], pending: Sequence[Job], console: Console):
        self.console, self.total, self.left = console, len(jobs), len(pending)
        self.work = {job.save: job.work for job in pending}
        self.done = dict.fromkeys(self.work, 0.0)
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.TextColumn("{task.percentage:.0f}%"),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TextColumn("time left"),
            rich.progress.TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            speed_estimate_period=3600,
        )
        self._task = self._bar.add_task(self._state(), total=sum(self.work.values()))

    def __enter__(self) -> StudyProgress:
        if self.left < self.total:
            self.console.print(f"{self.total - self.left} of {self.total} runs are finished already")
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def _state(self) -> str:
        return f"{self.total - self.left} of {self.total} runs"

    def advance(self, job: Job, done: float) -> None:
        """``done`` of ``job``'s work, in rollouts."""
        self._bar.advance(self._task, done - self.done[job.save])
        self.done[job.save] = done

    def finish(self, job: Job) -> None:
        self.advance(job, self.work[job.save])
        self.left -= 1
        self._bar.update(self._task, description=self._state())
        if self._bar.disable:
            seconds = self._bar.tasks[self._task].time_remaining
            left = f", about {seconds / 60:.0f} min left" if seconds else ""
            self.console.print(f"{self._state()}: {job.name}{left}", markup=False)
