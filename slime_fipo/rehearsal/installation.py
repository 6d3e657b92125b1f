"""Finds slime, Megatron-LM, SGLang and Ray for a rehearsal, or says in one line how to get what is missing."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from ..check.command import Command
from ..check.slime_parser import locate
from ..errors import UserError

PACKAGES = ("ray", "transformers", "tensorboard", "psutil", "aiohttp", "omegaconf", "uvloop", "xgrammar")
SGLANG = "0.5.15.post1"  # where a checkout of slime does not say what it pins
ROUTER = "0.3.2"
MEGATRON_COMMIT = "1dcf0dafa884ad52ffb243625717a3471643e087"
REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Installation:
    """Checkouts, and SGLang's version."""

    slime: Path
    megatron: Path
    sglang: str


def find(command: Command, slime_root: Path | None, megatron_root: Path | None) -> Installation:
    """What a rehearsal of this command runs.

    Raises:
        UserError: something is missing; one line with the command that installs it.
    """
    located = locate(command, slime_root, megatron_root)
    if located.slime is None:
        raise UserError(
            "slime not found: git clone https://github.com/THUDM/slime, then --slime-root slime (or SLIME_ROOT=slime)"
        )
    megatron = located.megatron or _imported_megatron()
    if megatron is None:
        raise UserError(
            "Megatron-LM not found: git clone https://github.com/NVIDIA/Megatron-LM && git -C Megatron-LM checkout"
            f" {MEGATRON_COMMIT}, then --megatron-root Megatron-LM (or MEGATRON_ROOT=Megatron-LM)"
        )
    wanted = pinned_sglang(located.slime)
    missing = [name for name in PACKAGES if find_spec(name) is None]
    found = _version("sglang")
    if found is None or (re.match(r"\d+\.\d+\.[1-9]", found) and found.partition("+")[0] != wanted):
        missing.append(f"SGLang {wanted}" + (f" (it has {found})" if found else ""))
    if _version("sglang-router") is None:
        missing.append(f"sglang-router {ROUTER}")
    if int((_version("numpy") or "1").partition(".")[0]) > 1:
        missing.append("numpy 1, which slime asserts")
    if missing:
        raise UserError(
            f"this Python lacks {', '.join(missing)}: make rehearsal-env SGLANG_VERSION={wanted} in"
            f" {REPOSITORY} makes an environment of its own, whose bin/slime-fipo can rehearse"
        )
    return Installation(located.slime, megatron, found)


def pinned_sglang(slime: Path) -> str:
    """The version of SGLang in the image that this slime's Dockerfile starts from."""
    try:
        dockerfile = (slime / "docker" / "Dockerfile").read_text(encoding="utf-8")
    except OSError:
        return SGLANG
    match = re.search(r"SGLANG_IMAGE_TAG=v(\d[\w.]*)", dockerfile)
    return match[1] if match else SGLANG


def _imported_megatron() -> Path | None:
    spec = find_spec("megatron")
    roots = [Path(folder).parent for folder in (spec and spec.submodule_search_locations) or ()]
    return next((root for root in roots if (root / "megatron" / "training" / "training.py").is_file()), None)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
