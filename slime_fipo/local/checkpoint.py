"""Checkpoints: one safetensors file each, written under a temporary name and renamed, with a checksum inside.

A file holds model and optimizer tensors, and in its header the counters of the run and a SHA-256 over all of them. A
process that dies while writing leaves a temporary file that nobody reads; a file damaged later is recognised.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .. import files

KEPT = 2  # newest checkpoints that stay: the last, and the one before in case the last is damaged
_OPTIMIZER_KEYS = ("step", "exp_avg", "exp_avg_sq")


@dataclass
class Checkpoint:
    """``tensors`` are on the CPU; ``counters`` is any JSON object."""

    tensors: dict[str, torch.Tensor]
    counters: dict


def state_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter.detach().cpu().contiguous()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = value.detach().cpu().contiguous()
    return tensors


def restore_tensors(tensors: dict[str, torch.Tensor], model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Inverse of :func:`state_tensors`. An optimizer that had not stepped yet is left as it is."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
            if f"optimizer.{name}.step" in tensors:
                state = {key: tensors[f"optimizer.{name}.{key}"].clone() for key in _OPTIMIZER_KEYS}
                # Adam wants its step count on the CPU, whatever the device.
                optimizer.state[parameter] = {k: v if k == "step" else v.to(parameter) for k, v in state.items()}


def _checksum(tensors: dict[str, torch.Tensor], counters: str) -> str:
    digest = hashlib.sha256(counters.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy())  # numpy has no bfloat16
    return digest.hexdigest()


def save_checkpoint(path: Path, tensors: dict[str, torch.Tensor], counters: dict) -> None:
    """Write ``path`` atomically, then remove all but the newest ``KEPT`` checkpoints of its directory.

    Names must sort in the order of their making.
    """
    header = json.dumps(counters, sort_keys=True)
    metadata = {"counters": header, "sha256": _checksum(tensors, header)}
    files.replace(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))
    remove_old_checkpoints(path.parent)


def remove_old_checkpoints(directory: Path) -> None:
    """Leave the newest ``KEPT``."""
    for old in checkpoint_files(directory)[KEPT:]:
        old.unlink()


def checkpoint_files(directory: Path) -> list[Path]:
    """Complete checkpoints, the newest first."""
    return sorted((f for f in directory.glob("*.safetensors") if not files.is_temporary(f)), reverse=True)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read and verify.

    Raises:
        ValueError: the file is damaged or no checkpoint of this engine; the message says what is wrong, on one line.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({str(error).splitlines()[0]})") from None
    if "sha256" not in metadata:
        raise ValueError(f"{path} is not a checkpoint of slime-fipo local")
    if metadata["sha256"] != _checksum(tensors, metadata.get("counters", "")):
        raise ValueError(f"{path} is damaged (its checksum is wrong)")
    return Checkpoint(tensors, json.loads(metadata["counters"]))
