"""The stand-ins' way into a process: on inside a rehearsal alone, and never in front of what is installed."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SITE = REPOSITORY / "slime_fipo" / "rehearsal" / "site"


def python(code: str, *paths: Path, rehearsal: bool = True) -> subprocess.CompletedProcess:
    """``python -c code`` with the stand-ins' folder first on PYTHONPATH, inside a rehearsal or not."""
    environment = {name: value for name, value in os.environ.items() if name != "SLIME_FIPO_REHEARSAL"}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, (SITE, *paths, REPOSITORY)))}
    environment |= {"SLIME_FIPO_REHEARSAL": "/nowhere"} if rehearsal else {}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/", timeout=300)


def package(folder: Path, name: str, source: str) -> Path:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(textwrap.dedent(source))
    return folder


ABSENT = ("sgl_kernel", "torch_memory_saver", "torchvision")


@pytest.mark.parametrize("name", ABSENT)
def test_absent_packages_can_be_imported_and_not_called(name):
    run = python(
        f"""
        import {name}
        from {name} import anything
        from {name}.below.further import Another

        class Mine(Another): ...

        for value in (anything, {name}.thing, anything.method, Another):
            try:
                value()
            except RuntimeError as error:
                assert "{name}" in str(error) and "no build for a CPU" in str(error), error
            else:
                raise AssertionError(value)
        """
    )
    assert run.returncode == 0, run.stderr


def test_outside_a_rehearsal_nothing_changes():
    run = python(
        """
        import sys
        print([finder for finder in sys.meta_path if "Completing" in repr(finder)])
        print([name for name in sys.modules if name == "_fipo_absent_packages"])
        for name in ("sgl_kernel", "torch_memory_saver"):
            try:
                __import__(name)
            except ModuleNotFoundError as error:
                print(error.name)
        """,
        rehearsal=False,
    )
    assert run.stdout.split("\n") == ["[]", "[]", "sgl_kernel", "torch_memory_saver", ""], run


def test_what_is_installed_is_used(tmp_path):
    package(tmp_path, "torchvision", "real = 1")
    run = python("import torchvision; print(torchvision.real, torchvision.__file__)", tmp_path)
    assert run.stdout.split() == ["1", str(tmp_path / "torchvision" / "__init__.py")], run


TORCH = "class cuda:\n    device_count = staticmethod(lambda: {})\n"


@pytest.mark.parametrize("rehearsal", [True, False])
@pytest.mark.parametrize("gpus", [0, 2])
def test_a_process_that_sees_a_gpu_is_refused(tmp_path, gpus, rehearsal):
    package(tmp_path, "torch", TORCH.format(gpus))
    run = python("import torch; print('imported')", tmp_path, rehearsal=rehearsal)
    if gpus and rehearsal:
        assert run.returncode != 0 and run.stdout == ""
        assert "torch sees 2 GPU(s)" in run.stderr.splitlines()[-1]
    else:
        assert run.stdout == "imported\n", run.stderr


def test_transformers_is_told_that_stand_ins_are_not_installed(tmp_path):
    package(tmp_path, "transformers", "")
    package(
        tmp_path / "transformers",
        "utils",
        "from . import import_utils\n",
    )
    (tmp_path / "transformers" / "utils" / "import_utils.py").write_text(
        "import importlib.util\n"
        "def _is_package_available(name, return_version=False):\n"
        "    return importlib.util.find_spec(name) is not None\n"
    )
    run = python(
        """
        import torchvision
        from transformers.utils import import_utils
        print(import_utils._is_package_available("torchvision"), import_utils._is_package_available("json"))
        """,
        tmp_path,
    )
    assert run.stdout.split() == ["False", "True"], run


@pytest.mark.parametrize("rehearsal", [True, False])
def test_the_sitecustomize_that_ours_hides_still_runs(tmp_path, rehearsal):
    (tmp_path / "sitecustomize.py").write_text("import builtins\nbuiltins.theirs = 'ran'\n")
    run = python("print(theirs)", tmp_path, rehearsal=rehearsal)
    assert run.stdout == "ran\n", run.stderr
