"""Finds slime and Megatron-LM for the tests marked ``slime``, or says how to enable them.

``SLIME_ROOT`` is a git clone of slime; each version is exported from it into a temporary directory, so that the
clone stays as it is. ``MEGATRON_ROOT`` is a checkout of Megatron-LM at the commit that slime's Dockerfile pins; only
the tests of slime's argument parser need it.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ENABLE

REPOSITORY = Path(__file__).resolve().parents[2]
VERSIONS = {"main": "624b824a", "v0.3.1": "v0.3.1", "v0.3.0": "v0.3.0"}
LAYOUTS = ("cp2", "cp4", "tp2", "dp2", "micro_batches")
PARSER_PACKAGES = ("sglang", "sglang_router", "orjson", "msgspec", "zmq", "fastapi", "IPython", "setproctitle")


def pytest_collection_modifyitems(items):
    for item in items:
        if "slime_clone" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slime)


@pytest.fixture(scope="session")
def slime_clone(slime_root) -> Path:
    if not (slime_root / ".git").exists():
        pytest.fail(f"SLIME_ROOT={slime_root} is no git clone of slime; {ENABLE}")
    for package in ("ray", "transformers", "httpx"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed; pip install '.[slime]', or make test-slime")
    return slime_root


@pytest.fixture(scope="session", params=VERSIONS)
def version(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def slime(version, slime_clone, tmp_path_factory) -> Path:
    """The files of one slime version, exported from the clone."""
    if subprocess.run(["git", "-C", slime_clone, "cat-file", "-e", f"{VERSIONS[version]}^{{commit}}"]).returncode:
        pytest.skip(f"SLIME_ROOT has no commit {VERSIONS[version]}; git -C $SLIME_ROOT fetch --tags origin")
    tree = tmp_path_factory.mktemp(f"slime-{version}")
    archive = subprocess.run(
        ["git", "-C", slime_clone, "archive", VERSIONS[version]], stdout=subprocess.PIPE, check=True
    )
    subprocess.run(["tar", "-x", "-C", tree], input=archive.stdout, check=True)
    return tree


@pytest.fixture(scope="session")
def results(slime, version, tmp_path_factory):
    """What the rig saved of this version, by parallel layout."""
    out = tmp_path_factory.mktemp(f"rig-{version}")
    run = python(["-m", "tests.slime.rig", version, out, "cp1", *LAYOUTS, "compiled"], slime, timeout=540)
    assert run.returncode == 0, run.stderr[-4000:]
    return {path.stem: torch.load(path, weights_only=True) for path in out.glob("*.pt")}


@pytest.fixture(scope="session")
def megatron() -> Path:
    root = os.environ.get("MEGATRON_ROOT")
    if not root:
        pytest.skip(
            "MEGATRON_ROOT is not set; to run slime's argument parser: git clone https://github.com/NVIDIA/Megatron-LM,"
            " git checkout 1dcf0dafa884ad52ffb243625717a3471643e087, then MEGATRON_ROOT=that/directory make test-slime"
        )
    missing = [package for package in PARSER_PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"slime's parser needs {', '.join(missing)}; make test-slime installs them")
    return Path(root).resolve()


def python(arguments, *paths, cwd=REPOSITORY, timeout=300, **environment) -> subprocess.CompletedProcess:
    """Run this interpreter with ``paths`` on PYTHONPATH; output as text, errors not raised."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (*paths, REPOSITORY))),
        "PYTHONWARNINGS": "ignore",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        **environment,
    }
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=timeout, env=environment)
