"""The bases of the patches, each as slime's own files and with the patch as ``git am`` applies it."""

import subprocess

import pytest

from slime_fipo.plugin.patch import PATCHES
from tests.slime.conftest import VERSIONS, megatron, python, slime_clone  # noqa: F401  fixtures

IDENTITY = ("-c", "user.name=a", "-c", "user.email=a@example.invalid")
BASES = sorted(folder.name for folder in PATCHES.iterdir() if folder.is_dir())


def git(root, *arguments) -> str:
    command = ["git", *IDENTITY, *map(str, arguments)]
    return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="session", params=BASES)
def series(request):
    """The folder with a base's patches."""
    return PATCHES / request.param


@pytest.fixture(scope="session")
def version(series) -> str:
    """The name that tests/slime gives this base."""
    return "main" if series.name.startswith("main") else series.name


@pytest.fixture(scope="session")
def base(version, slime_clone, tmp_path_factory):  # noqa: F811
    """A git checkout of the base, as slime has it."""
    commit = VERSIONS[version]
    if subprocess.run(["git", "-C", slime_clone, "cat-file", "-e", f"{commit}^{{commit}}"]).returncode:
        pytest.skip(f"SLIME_ROOT has no commit {commit}; git -C $SLIME_ROOT fetch --tags origin")
    root = tmp_path_factory.mktemp("base") / "slime"
    git(slime_clone, "clone", "--quiet", "--shared", "--no-checkout", slime_clone, root)
    git(root, "checkout", "--quiet", "--detach", commit)
    return root


@pytest.fixture(scope="session")
def patched(series, base, tmp_path_factory):
    root = tmp_path_factory.mktemp("patched") / "slime"
    git(base, "clone", "--quiet", "--shared", base, root)
    git(root, "am", "--quiet", *sorted(series.glob("*.patch")))
    return root
