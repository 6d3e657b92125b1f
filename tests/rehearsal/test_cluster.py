"""What a rehearsal refuses before it starts anything."""

from pathlib import Path

import pytest
import torch

from slime_fipo.errors import UserError
from slime_fipo.rehearsal import cluster


def checkout(folder: Path, file: str) -> Path:
    (folder / file).parent.mkdir(parents=True)
    (folder / file).touch()
    return folder


@pytest.fixture
def slime(tmp_path):
    return checkout(tmp_path / "slime", "slime/backends/megatron_utils/actor.py")


@pytest.fixture
def megatron(tmp_path):
    return checkout(tmp_path / "megatron", "megatron/training/training.py")


def test_a_folder_that_is_no_checkout_is_named(tmp_path, slime, megatron):
    with pytest.raises(UserError, match=r"--slime-root .*: no such checkout"):
        cluster.Rehearsal(tmp_path, megatron, gpus=1, log=tmp_path / "log")
    with pytest.raises(UserError, match=r"--megatron-root .*: no such checkout"):
        cluster.Rehearsal(slime, tmp_path, gpus=1, log=tmp_path / "log")


def test_a_machine_with_a_gpu_is_refused(tmp_path, slime, megatron, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="this machine has a GPU"):
        cluster.Rehearsal(slime, megatron, gpus=1, log=tmp_path / "log")
