"""Settings that must stand before the first import of torch or triton, for every test; and where slime is."""

import importlib.util
import os
from pathlib import Path

import hypothesis
import pytest
import torch

ENABLE = "git clone https://github.com/THUDM/slime, then SLIME_ROOT=that/directory make test-slime"

# Without a GPU the kernel's tests run in Triton's interpreter, which reads this when a kernel is defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# No test asserts a time: machines are shared.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")

torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(scope="session")
def slime_root() -> Path:
    """``SLIME_ROOT``, or the clone that slime is importable from."""
    root = os.environ.get("SLIME_ROOT") or importable_clone()
    if not root:
        pytest.skip(f"SLIME_ROOT is not set; to run against slime: {ENABLE}")
    return Path(root).resolve()


def importable_clone() -> Path | None:
    """The clone that ``import slime`` comes from, as in slime's container; PyPI's ``slime`` is something else."""
    spec = importlib.util.find_spec("slime")
    for folder in (spec and spec.submodule_search_locations) or ():
        root = Path(folder).parent
        if (root / ".git").exists() and (root / "slime" / "backends" / "megatron_utils").is_dir():
            return root
    return None
