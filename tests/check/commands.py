"""Train commands for the tests of ``slime-fipo check``: those of our launch scripts with the files that they name, and
the same with one fault.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from slime_fipo.check.command import parse_command
from slime_fipo.check.preflight import check_command, main

from ..scripts.bash import EXAMPLES, dry_run, flags, train_arguments
from ..scripts.published import hugging_face_config, model_of

QWEN3_4B = EXAMPLES / "run-qwen3-4B.sh"
MATH_7B = EXAMPLES / "run-qwen2.5-math-7B.sh"
QWEN_32B = EXAMPLES / "run-qwen2.5-32B.sh"
QWEN35_9B = EXAMPLES / "run-qwen3.5-9B.sh"

PROMPT = {"prompt": [{"role": "user", "content": "1 + 1 = ? End with the line 'Answer: \\boxed{N}'."}], "label": "2"}


def provide_files(words: list[str], positions: int = 32768) -> None:
    """Data and checkpoints at the paths of a command, with the published model's configuration."""
    named = flags(train_arguments(words))
    for path in [*named["--prompt-data"], *named["--eval-prompt-data"][1::2]]:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(PROMPT) + "\n")
    (reference := Path(named["--ref-load"][0])).mkdir(parents=True)
    (reference / "latest_checkpointed_iteration.txt").write_text("release")
    (checkpoint := Path(named["--hf-checkpoint"][0])).mkdir(parents=True)
    config = hugging_face_config(model_of(checkpoint.name), positions)
    (checkpoint / "config.json").write_text(json.dumps(config))


def command_of(script: Path, root: Path, **variables: str) -> list[str]:
    words = dry_run(script, MODEL_ROOT="/ROOT/models", DATA_ROOT="/ROOT/data", **variables)  # one dry run for all roots
    return [word.replace("/ROOT/", f"{root}/") for word in words]


@dataclass(frozen=True)
class Broken:
    """A working launch script's command with one fault: flags put behind it, taken out, or a file changed."""

    names: str
    fix: str
    add: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    file: tuple[str, str | None] | None = None  # path below the root: its text, or None for a missing one
    script: Path = QWEN3_4B
    variables: dict = field(default_factory=dict)
    error: bool = True
    tool: tuple[str, str] | None = None  # a word of the command, and what stands in its place
    write: dict[str, str] = field(default_factory=dict)  # further files below the root, named FILE:path in `add`


def flag(*words: str) -> tuple[str, ...]:
    return words


HF, REF, DATA = "models/Qwen3-4B-Base", "models/Qwen3-4B-Base_torch_dist", "data/dapo-math-17k/dapo-math-17k.jsonl"
TRACKER = f"{REF}/latest_checkpointed_iteration.txt"

FIPO_FLAGS = (
    "--fipo-decay-rate",
    "--fipo-clip-ratio-low",
    "--fipo-clip-ratio-high",
    "--fipo-safety-thresh",
    "--fipo-dual-clip-c",
)


def without(words: list[str], flags_to_drop: tuple[str, ...]) -> list[str]:
    kept, dropping = [], False
    for word in words:
        if word.startswith("--"):
            dropping = word in flags_to_drop
        if not dropping:
            kept.append(word)
    return kept


def messages(words: list[str]) -> list[str]:
    return [f"{finding.severity}: {finding.message}" for finding in check_command(parse_command(words))[0]]


def expect(broken: Broken, root: Path, capsys, at_most: int = 1) -> None:
    """The fault is found by its flag with its fix, and little else is; as a command too."""
    words = command_of(broken.script, root, **broken.variables)
    provide_files(words)
    if broken.file is not None:
        path, text = broken.file
        assert (root / path).is_file()
        if text is None:
            (root / path).unlink()
        else:
            (root / path).write_text(text)
    for path, text in broken.write.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text.replace("ROOT/", f"{root}/"))
    added = [word.replace("FILE:", f"{root}/") for word in broken.add]
    words = [*without(words, broken.drop), *added]
    if broken.tool is not None:
        words = [word.replace(*broken.tool) if word.endswith(broken.tool[0]) else word for word in words]

    findings, _ = check_command(parse_command(words))
    matching = [f for f in findings if broken.names in f.message and broken.fix in f.message]
    assert matching, findings
    assert [f.severity for f in matching] == ["error" if broken.error else "warning"]
    assert len(findings) <= at_most, findings
    assert "\n" not in matching[0].message

    status = main(words)
    assert status == int(broken.error)
    assert matching[0].message in capsys.readouterr().out
