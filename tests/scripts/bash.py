"""Runs the project's bash scripts and reads what they would do."""

from __future__ import annotations

import functools
import os
import shlex
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODELS = sorted((ROOT / "scripts" / "models").glob("*.sh"))
EXAMPLES = ROOT / "examples" / "fipo"
LAUNCH_SCRIPTS = sorted(set(EXAMPLES.glob("run-*.sh")) - {EXAMPLES / "run-embedded.sh"})
LOSSES = ("fipo_loss", "policy_loss")


def model_args(script: Path) -> list[str]:
    """The words of MODEL_ARGS after sourcing a model script."""
    program = 'set -eu; source "$1"; printf "%s\\0" "${MODEL_ARGS[@]}"'
    output = subprocess.run(
        ["bash", "-c", program, "-", str(script)], env=clean(), capture_output=True, check=True
    ).stdout
    return output.decode().split("\0")[:-1]


def flags(words: list[str]) -> dict[str, list[str]]:
    """Flag: its values, in order. A flag given twice keeps its last values."""
    found: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            found[word] = current = []
        else:
            current.append(word)
    return found


def clean(**variables: str) -> dict[str, str]:
    """An environment with nothing that a launch script reads, but ``variables``."""
    return {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **variables}


@functools.cache
def _dry_run_output(script: Path, arguments: tuple[str, ...], variables: tuple[tuple[str, str], ...]) -> str:
    command, env = ["bash", str(script), *arguments], clean(DRY_RUN="1", **dict(variables))
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert result.stderr == ""
    return result.stdout


def dry_run(script: Path, *arguments: str, **variables: str) -> list[str]:
    """The words of the command that a launch script prints."""
    lines = _dry_run_output(script, arguments, tuple(variables.items())).splitlines()
    assert len(lines) == 1
    return shlex.split(lines[0])


def train_arguments(words: list[str]) -> list[str]:
    """What stands behind slime's train script."""
    script = next(i for i, word in enumerate(words) if word.endswith("/train.py"))
    assert words[:3] == ["ray", "job", "submit"]
    assert words[script - 3 : script] == ["python3", "-m", "slime_fipo"]
    return words[script + 1 :]
