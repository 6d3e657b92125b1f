"""``slime-fipo rehearse`` as a user runs it: one of our launch scripts' commands, with small files at its paths."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..rehearsal.families import checkpoint_of
from ..scripts.bash import dry_run, flags, train_arguments

REPOSITORY = Path(__file__).resolve().parents[2]
ASKS = (
    "Solve the following math problem step by step. The last line of your response should be of the form"
    " Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n{}\n\nRemember to put your answer"
    ' on its own line after "Answer:".'
)
PROMPTS, BENCHMARK = 64, 4


@dataclass
class Workspace:
    """A command, and the folder with everything that it names."""

    root: Path
    words: list[str]

    def value(self, flag: str) -> str:
        """The last value of a flag."""
        return flags(train_arguments(self.words))[flag][-1]

    def set(self, flag: str, *values: str) -> None:
        """Behind everything else, where it wins."""
        self.words += [flag, *values]

    def drop(self, flag: str) -> None:
        start = self.words.index(flag)
        end = next((i for i in range(start + 1, len(self.words)) if self.words[i].startswith("--")), len(self.words))
        del self.words[start:end]

    def module(self, name: str, text: str) -> None:
        """A Python module of the user's, in a folder that is on the job's PYTHONPATH."""
        (self.root / "code").mkdir(exist_ok=True)
        (self.root / "code" / f"{name}.py").write_text(text)

    def yaml(self, name: str, text: str) -> str:
        (self.root / name).write_text(text)
        return str(self.root / name)

    @property
    def checkpoint(self) -> Path:
        return Path(self.value("--hf-checkpoint"))

    def edit_config(self, **changes) -> None:
        file = self.checkpoint / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def workspace(root: Path, script: Path, **variables: str) -> Workspace:
    """The command of a launch script, its checkpoint of the published shape, prompts and a benchmark."""
    words = dry_run(script, MODEL_ROOT="/ROOT/models", DATA_ROOT="/ROOT/data", **variables)
    space = Workspace(root, [word.replace("/ROOT/", f"{root}/") for word in words])
    checkpoint_of(space.checkpoint)
    write_prompts(Path(space.value("--prompt-data")), PROMPTS)
    write_prompts(Path(space.value("--eval-prompt-data")), BENCHMARK)
    return space


def write_prompts(path: Path, count: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = (row(f"What is {i} + {i + 1}?", 2 * i + 1) for i in range(count))
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))


def row(problem: str, answer: int) -> dict:
    return {"prompt": [{"role": "user", "content": ASKS.format(problem)}], "label": str(answer)}


@dataclass
class Rehearsed:
    """Exit status and output, and the verdict's lines as (mark, what, text)."""

    status: int
    output: str
    lines: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def wrong(self) -> list[str]:
        """What and text of each line that says that something is wrong; of exit code 2 the one line there is."""
        if self.status == 2:
            return self.output.splitlines()[-1:]
        return [f"{what} {text}" for mark, what, text in self.lines if mark == "✗"]


def rehearse(python: str, slime: Path, megatron: Path, words: Sequence[str], root: Path) -> Rehearsed:
    """Run it to its end; ``root`` has the folder of the user's own modules."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(root / "code")]),
        "COLUMNS": "2000",  # a line of the verdict is then a line of the output
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(root),
    }
    roots = ["--slime-root", slime, "--megatron-root", megatron]
    command = [python, "-m", "slime_fipo.cli", "rehearse", *roots, "--", *words]
    done = subprocess.run(
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        cwd=root,
    )  # fmt: skip
    return Rehearsed(done.returncode, done.stdout, list(verdict(done.stdout)))


def verdict(output: str) -> Iterator[tuple[str, str, str]]:
    """The lines of the verdict's table."""
    for line in re.split(r"^verdict\s*$", output, flags=re.MULTILINE)[-1].splitlines():
        if found := re.match(r"\s{2}([✓✗–])\s{2,}(\S.*?)\s{2,}(.*)$", line):
            yield found[1], found[2], found[3].strip()
