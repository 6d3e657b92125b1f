"""Runs the project's bash scripts and reads what they would do."""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import subprocess
import sys
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


# What the launch scripts call, but for python3 and ray.
TOOLS = ("bash", "basename", "cat", "cut", "date", "dirname", "env", "getent", "grep", "hostname", "mktemp", "od")
TOOLS += ("realpath", "rm", "sleep", "stat", "tr", "uname")


def machine(directory: Path, without: tuple[str, ...] = (), python_flags: str = "", **variables: str) -> dict[str, str]:
    """The environment of a machine with the programs and checkouts that a launch script looks for, below ``directory``.

    Its ``ray`` does nothing and fails. Models and data are missing, but for the one that a script reads first.

    Args:
        without: programs that are not on its PATH, of ``python3`` and ``ray``.
        python_flags: flags for its Python; with ``-S`` it has no packages.
        variables: set in place of the machine's own.
    """
    programs, base = directory / "bin", directory / "models" / "Qwen2.5-Math-7B"
    for folder in (programs, base, directory / "slime", directory / "megatron" / "megatron" / "training"):
        folder.mkdir(parents=True)
    for tool in TOOLS:
        (programs / tool).symlink_to(shutil.which(tool))
    commands = {"python3": f'{shlex.quote(sys.executable)} {python_flags} "$@"', "ray": "false"}
    for name in commands.keys() - set(without):
        (programs / name).write_text(f"#!/bin/bash\nexec {commands[name]}\n")
        (programs / name).chmod(0o755)
    (directory / "slime" / "train.py").touch()
    (base / "config.json").write_text('{"max_position_embeddings": 4096}')
    return {
        "PATH": str(programs),
        "SLIME_DIR": str(directory / "slime"),
        "MEGATRON_DIR": str(directory / "megatron"),
        "MODEL_ROOT": str(directory / "models"),
        "SAVE": str(directory / "save"),
        "RAY_ADDRESS": "http://127.0.0.1:1",
        **variables,
    }


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
