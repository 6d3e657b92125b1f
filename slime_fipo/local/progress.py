"""What a person sees of a run while it lasts. What it leaves behind is shown by ``slime_fipo.report``."""

from __future__ import annotations

from collections.abc import Iterator

import rich.progress
from rich.console import Console


class Progress:
    """A progress bar on a terminal; plain lines where the output is a file or a pipe."""

    def __init__(self):
        self.console = Console(soft_wrap=True, highlight=False)
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeRemainingColumn(),
            rich.progress.TextColumn("{task.fields[state]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def track(self, description: str, start: int, stop: int) -> Iterator[int]:
        self._description, self._number, self._stop = description, start, stop
        self._task = self._bar.add_task(description, completed=start, total=max(start, stop), state="")
        for number in range(start, stop):
            self._number = number
            yield number
            self._bar.advance(self._task)

    def show(self, state: str) -> None:
        """Where the tracked loop stands."""
        self._bar.update(self._task, state=state)
        if self._bar.disable:
            self.say(f"{self._description} {self._number + 1}/{self._stop}: {state}")

    def say(self, message: str) -> None:
        self.console.print(message, markup=False)
