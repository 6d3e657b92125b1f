"""slime's own launch scripts as words, without running them: they end every Python process of the machine first.

What is evaluated are what a script assigns, its model's script, and the words behind its train
script, by a bash that can start nothing.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

_ASSIGNMENT = re.compile(r"^(?:export )?[A-Z_]+=(?:\(\n.*?^\)|(?!\()[^`\n]*$)", re.MULTILINE | re.DOTALL)
_MODEL = re.compile(r"""^(?:[A-Z_]+=\S+ )?source "?\S*?/(models/[\w.-]+\.sh)"?""", re.MULTILINE)
_TRAIN = re.compile(r"""\b(train(?:_async)?\.py)"?((?:[^\n]*\\\n)*[^\n]*)""")


def train_command(slime: Path, script: Path) -> list[str] | None:
    """``python3 train.py …`` as the script would start it; None if it starts something else."""
    text = script.read_text()
    train, model = _TRAIN.search(text), _MODEL.search(text)
    if train is None or model is None:
        return None
    arguments = re.sub(r"\d?>&?\S+|\|.*", "", train[2])
    program = "\n".join(
        [
            'dirname() { [[ $1 == -- ]] && shift; printf "%s" "${1%/*}"; }',
            f'source "{slime}/scripts/{model[1]}"',
            *filter(_is_plain, _ASSIGNMENT.findall(re.sub(r"^\s*#.*$", "", text, flags=re.MULTILINE))),
            f"words=({arguments.replace(chr(92) + chr(10), ' ')})",
            'printf "%s\\0" "${words[@]}"',
        ]
    )
    environment = {"PATH": "/nowhere", "BASE_FOLDER": "/root", "MASTER_ADDR": "127.0.0.1", "NUM_GPUS": "8"}
    environment |= {"WANDB_KEY": "key", "WANDB_API_KEY": "key"}
    run = subprocess.run(["/bin/bash", "--norc", "-c", program], env=environment, capture_output=True, text=True)
    return ["python3", str(slime / train[1]), *run.stdout.split("\0")[:-1]]


def _is_plain(assignment: str) -> bool:
    """Whether it starts nothing and ends on its line."""
    return not re.search(r"\$\((?!\()", assignment) and assignment.count('"') % 2 == assignment.count("'") % 2 == 0
