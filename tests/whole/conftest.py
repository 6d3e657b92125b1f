"""Finds what the whole loop needs, or says how to get it; runs each variant of the loop once.

``make test-whole`` makes the environment in which slime, Megatron-LM and SGLang run, and names its interpreter in
``WHOLE_PYTHON``: its pinned numpy and transformers are others than the tests' own.
"""

import json
import os
import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SLIME_MAIN = "624b824a"
HOW = "SLIME_ROOT=… MEGATRON_ROOT=… make test-whole"
STEPS_PER_ROLLOUT = 2  # of every run; loop.py's batch sizes


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.whole)


@dataclass
class Run:
    """One finished run of the loop: slime's scalars, and what was left when it was over."""

    folder: Path

    @cached_property
    def result(self) -> dict:
        return json.loads((self.folder / "metrics.json").read_text())

    def steps(self, metric: str) -> dict[int, float]:
        """Step -> value of a metric, in the order of steps."""
        assert metric in self.result["metrics"], f"{metric} is not among {sorted(self.result['metrics'])}"
        return dict(sorted((int(step), value) for step, value in self.result["metrics"][metric]))

    def first_steps(self, metric: str) -> list[float]:
        """Values at each rollout's first optimizer step."""
        return [value for step, value in self.steps(metric).items() if step % STEPS_PER_ROLLOUT == 0]

    def later_steps(self, metric: str) -> list[float]:
        return [value for step, value in self.steps(metric).items() if step % STEPS_PER_ROLLOUT]


class Loop:
    """Runs the loop in the environment made for it."""

    def __init__(self, python: str, slime: Path, megatron: Path, folder: Path) -> None:
        self._python, self.slime, self.megatron, self.folder = python, slime, megatron, folder

    def on(self, slime: Path) -> "Loop":
        """The same with another checkout of slime."""
        return Loop(self._python, slime, self.megatron, self.folder)

    def start(self, module: str, *arguments, **variables: str) -> subprocess.Popen:
        """Run a module in that environment, with more variables."""
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
        environment |= {"OMP_NUM_THREADS": "1", **variables}
        command = [self._python, "-m", module, *map(str, arguments)]
        with (self.folder / "output.log").open("ab") as output:
            return subprocess.Popen(command, stdout=output, stderr=output, cwd=REPOSITORY, env=environment)

    def model(self, dtype: str) -> Path:
        """A small random Qwen3 with weights of this dtype."""
        folder = self.folder / f"model-{dtype}"
        if not folder.exists():
            status = self.start("tests.whole.model", folder, dtype).wait()
            assert status == 0, (self.folder / "output.log").read_text()[-4000:]
        return folder

    def start_run(
        self, folder: Path, gpus: int, script: Path, *flags, dtype: str = "bfloat16", **variables: str
    ) -> subprocess.Popen:
        """``tests.whole.loop`` with its results in ``folder``, which ``{folder}`` in a flag stands for."""
        flags = [str(flag).format(folder=folder) for flag in flags]
        roots = (self.slime, self.megatron, self.model(dtype))
        return self.start("tests.whole.loop", *roots, folder, gpus, script, *flags, **variables)

    def __call__(self, name: str, gpus: int, script: Path, *flags, dtype: str = "bfloat16", **variables: str) -> Run:
        """A whole run; fails the test with the end of its log if it ended with an error."""
        folder = self.folder / name
        status = self.start_run(folder, gpus, script, *flags, dtype=dtype, **variables).wait()
        log = folder / "train.log"
        assert status == 0, (log if log.exists() else self.folder / "output.log").read_text(errors="replace")[-6000:]
        return Run(folder)


@pytest.fixture(scope="session")
def loop(slime_root, tmp_path_factory) -> Loop:
    python, megatron = os.environ.get("WHOLE_PYTHON"), os.environ.get("MEGATRON_ROOT")
    if not python:
        pytest.skip(f"WHOLE_PYTHON is not set; to run the whole of slime: {HOW}")
    if not megatron:
        pytest.skip(f"MEGATRON_ROOT is not set (Megatron-LM at the commit of slime's Dockerfile, 1dcf0daf); {HOW}")
    folder = tmp_path_factory.mktemp("whole")
    return Loop(python, checkout(slime_root, SLIME_MAIN, folder / "slime"), Path(megatron).resolve(), folder)


def checkout(slime_root: Path, commit: str, folder: Path) -> Path:
    """The tree of a commit of the clone at ``slime_root``, in ``folder``."""
    archive = subprocess.run(["git", "-C", slime_root, "archive", commit], stdout=subprocess.PIPE)
    if archive.returncode:
        pytest.skip(f"SLIME_ROOT is no clone with commit {commit}; git -C $SLIME_ROOT fetch origin --tags")
    folder.mkdir()
    subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
    return folder
