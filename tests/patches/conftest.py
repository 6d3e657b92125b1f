"""The bases of the patches, each as slime's own files and as patched by git am."""

import shutil
import subprocess

import pytest

from slime_fipo.plugin import patch
from tests.slime.conftest import megatron, python, slime_clone  # noqa: F401  fixtures

IDENTITY = ("-c", "user.name=a", "-c", "user.email=a@example.invalid")


def git(root, *arguments) -> str:
    command = ["git", *IDENTITY, *map(str, arguments)]
    return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="session", params=[series.name for series in patch.all_series()])
def series(request) -> patch.Series:
    return next(series for series in patch.all_series() if series.name == request.param)


@pytest.fixture(scope="session")
def version(series) -> str:
    """The name that tests/slime gives this base."""
    return "main" if series.name.startswith("main") else series.name


@pytest.fixture(scope="session")
def base(series, slime_clone, tmp_path_factory):  # noqa: F811
    """A git checkout of the base, as slime has it."""
    if subprocess.run(["git", "-C", slime_clone, "cat-file", "-e", f"{series.commit}^{{commit}}"]).returncode:
        pytest.skip(f"SLIME_ROOT has no commit {series.commit}; git -C $SLIME_ROOT fetch --tags origin")
    root = tmp_path_factory.mktemp("base") / "slime"
    git(slime_clone, "clone", "--quiet", "--shared", "--no-checkout", slime_clone, root)
    git(root, "checkout", "--quiet", "--detach", series.commit)
    return root


@pytest.fixture(scope="session")
def patched(series, base, tmp_path_factory):
    """A git checkout of the base with the whole series, as git am applies it."""
    root = tmp_path_factory.mktemp("patched") / "slime"
    shutil.copytree(base, root, symlinks=True)
    git(root, "am", "--quiet", *series.paths)
    return root
