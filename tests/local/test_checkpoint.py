"""Checkpoints: exact round trip, damage of every kind recognised."""

import pytest
import torch
from safetensors.torch import save_file

from slime_fipo.errors import UserError
from slime_fipo.local.checkpoint import (
    checkpoint_files,
    read_checkpoint,
    restore_tensors,
    save_checkpoint,
    state_tensors,
)
from slime_fipo.local.data import Record
from slime_fipo.local.engine import _checkpoint_to_load
from slime_fipo.local.training import demonstration_batch, demonstration_step, make_optimizer

from .rig import CPU, tiny_args, tiny_model


def _steps(args, model, optimizer, alphabet, steps):
    batch = demonstration_batch([Record("1+2=", "3"), Record("4+", "+4=4;4")], alphabet, CPU)
    return [demonstration_step(args, model, optimizer, batch, step) for step in steps]


def test_training_goes_on_bit_for_bit(tmp_path):
    args = tiny_args()
    model, alphabet = tiny_model(args)
    optimizer = make_optimizer(args, model, 1e-3)
    _steps(args, model, optimizer, alphabet, range(3))
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, state_tensors(model, optimizer), {"n": 3})
    expected = _steps(args, model, optimizer, alphabet, range(3, 6))

    other = tiny_model(tiny_args("--seed", "7"))[0]
    optimizer = make_optimizer(args, other, 1e-3)
    checkpoint = read_checkpoint(path)
    assert checkpoint.counters == {"n": 3}
    restore_tensors(checkpoint.tensors, other, optimizer)
    assert _steps(args, other, optimizer, alphabet, range(3, 6)) == expected
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "garbage", "counters"])
def test_damage_is_recognised(tmp_path, damage):
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, {"x": torch.arange(100.0)}, {"rollouts": 3})
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        data = data[: len(data) // 2]
    elif damage == "flipped":
        data[-7] ^= 1
    elif damage == "empty":
        data = b""
    elif damage == "garbage":
        data = b"no checkpoint at all"
    else:
        data = data.replace(b'rollouts\\": 3', b'rollouts\\": 4')
    assert bytes(data) != path.read_bytes()
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.safetensors (cannot be read|is damaged)") as error:
        read_checkpoint(path)
    assert "\n" not in str(error.value)


def test_only_the_newest_two_stay_and_leftovers_are_not_read(tmp_path):
    (tmp_path / "c_3.safetensors.tmp").write_bytes(b"half")
    for name in ("a_1", "a_2", "b_0"):
        save_checkpoint(tmp_path / f"{name}.safetensors", {"x": torch.zeros(1)}, {})
    assert [file.stem for file in checkpoint_files(tmp_path)] == ["b_0", "a_2"]


def test_files_of_others_are_no_checkpoint(tmp_path):
    """A model of someone else's, in bfloat16 as they come, with and without metadata."""
    path = tmp_path / "model.safetensors"
    for metadata in (None, {"format": "pt"}, {"sha256": "0", "counters": "{}"}):
        save_file({"model.embed": torch.zeros(3, 2, dtype=torch.bfloat16), "step": torch.tensor(1.0)}, path, metadata)
        with pytest.raises(ValueError, match=r"model\.safetensors is (not a checkpoint|damaged)") as error:
            read_checkpoint(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool])
def test_every_dtype_comes_back(tmp_path, dtype):
    tensors = {
        "a": torch.arange(6).reshape(2, 3).to(dtype),
        "scalar": torch.tensor(1).to(dtype),
        "none": torch.zeros(0),
    }
    save_checkpoint(tmp_path / "a.safetensors", tensors, {})
    for name, tensor in read_checkpoint(tmp_path / "a.safetensors").tensors.items():
        assert tensor.dtype == tensors[name].dtype and torch.equal(tensor, tensors[name])


@pytest.mark.parametrize("counters", [{}, {"model": {}, "counters": {}}, {"model": 3, "counters": 4}, []])
def test_load_of_a_checkpoint_that_says_too_little(tmp_path, counters):
    save_checkpoint(tmp_path / "a.safetensors", {}, counters)
    with pytest.raises(UserError, match=r"--load .*a\.safetensors") as error:
        _checkpoint_to_load(tiny_args("--load", str(tmp_path / "a.safetensors")))
    assert "\n" not in str(error.value)
