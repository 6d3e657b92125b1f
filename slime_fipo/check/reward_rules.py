"""Rules of ``slime-fipo check`` about slime's rewards by name (``--rm-type``): which there are, what form of answer
each reads, and whether model and prompts come to it. Keys, labels and our own reward's settings are judged elsewhere.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..algorithm import FipoConfig
from .command import Command
from .derived import OUR_REWARD
from .file_rules import chosen_rows, sliced_path
from .finding import Finding, error, warning

# In slime v0.3.0 to main 624b824a.
REWARDS = ("dapo", "deepscaler", "f1", "gpqa", "ifbench", "math", "random", "remote_rm")
# What these read is outside the box or is the box, and boxed_ hands them what is inside: every answer is wrong.
READ_OUTSIDE_THE_BOX = ("dapo", "deepscaler", "math")
_ANSWER = re.compile(r"answer\s*[:：]", re.IGNORECASE)
_BOX = re.compile(r"box", re.IGNORECASE)


def _names(command: Command) -> Iterator[tuple[str, str]]:
    """Every reward by name that the run calls, with the words that name it."""
    args = command.args
    if args.custom_rm_path is None and args.rm_type is not None and not args.debug_train_only:
        yield f"--rm-type {args.rm_type}", args.rm_type.strip()
    for dataset in command.eval_datasets:
        if dataset.rm_type is not None and dataset.custom_rm_path is None and args.custom_rm_path is None:
            yield f"rm_type {dataset.rm_type} of {dataset.name} in {dataset.source}", dataset.rm_type.strip()


def known_rewards(slime_root: Path | None) -> tuple[str, ...]:
    """The rewards by name of a checkout of slime, read from its source; of the versions that we know without one."""
    if slime_root is not None:
        with contextlib.suppress(OSError, SyntaxError, ValueError):
            hub = slime_root / "slime" / "rollout" / "rm_hub" / "__init__.py"
            tree = ast.parse(hub.read_text(encoding="utf-8"))
            found = {
                node.comparators[0].value
                for node in ast.walk(tree)
                if isinstance(node, ast.Compare)
                and isinstance(node.left, ast.Name)
                and node.left.id == "rm_type"
                and isinstance(node.ops[0], ast.Eq)
                and isinstance(node.comparators[0], ast.Constant)
                and isinstance(node.comparators[0].value, str)
            }
            if found:
                return tuple(sorted(found))
    return REWARDS


def reward_names(command: Command, config: FipoConfig | None) -> Iterator[Finding]:
    known = known_rewards(command.slime_root)
    for words, name in _names(command):
        plain = name.removeprefix("boxed_")
        if plain not in known:
            yield error(
                f"{words} is no reward of slime's, which raises at the first response; it has {', '.join(known)}, and"
                " --custom-rm-path for yours"
            )
        elif plain != name and plain in READ_OUTSIDE_THE_BOX:
            reads = {
                "dapo": r"'Answer:' in what is left of \boxed{…}",
                "deepscaler": r"</think> in what is left of \boxed{…}",
                "math": r"\boxed{…}, which boxed_ has taken off",
            }[plain]
            yield error(f"{words} scores every right answer as wrong: it looks for {reads}; use {plain}")


def deepscaler(command: Command, config: FipoConfig | None) -> Iterator[Finding]:
    """That reward is 0 for a response without </think>, whatever it says."""
    for words, name in _names(command):
        reason = _never_thinks(command.args)
        if name == "deepscaler" and reason:
            yield warning(
                f"{words} gives 0 to every response without </think>, and {reason}; use math (\\boxed{{…}}) or dapo"
                " ('Answer: …') unless the model was trained to think"
            )
            return


def _never_thinks(args: argparse.Namespace) -> str:
    """Why the model's responses will have no </think>; empty where nothing says so."""
    with contextlib.suppress(ValueError, AttributeError):
        if json.loads(args.apply_chat_template_kwargs or "{}").get("enable_thinking") is False:
            return "--apply-chat-template-kwargs turns thinking off"
    if args.hf_checkpoint is None:
        return ""
    folder = Path(args.hf_checkpoint)
    if re.search(r"(?:^|[-_.])base(?:$|[-_.])", folder.name, re.IGNORECASE):
        return f"{folder.name} is a base model"
    template = _chat_template(folder)
    return f"the chat template of {folder} knows none" if template and "</think>" not in template else ""


def _chat_template(folder: Path) -> str:
    with contextlib.suppress(OSError, ValueError):
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            template = json.loads((folder / name).read_text(encoding="utf-8")).get("chat_template")
            if template:
                return template if isinstance(template, str) else json.dumps(template)
    return ""


# -- prompts --


def prompts(command: Command, config: FipoConfig | None) -> Iterator[Finding]:
    """Data whose prompts never ask for the form that the reward reads: the model cannot know it."""
    args = command.args
    files = []
    if args.prompt_data is not None and not args.debug_train_only:
        files.append(("--prompt-data", args.prompt_data, args.input_key, args.custom_rm_path, args.rm_type))
    for dataset in command.eval_datasets:
        key = dataset.input_key or args.eval_input_key or args.input_key
        path, name = dataset.custom_rm_path or args.custom_rm_path, dataset.rm_type or args.rm_type
        files.append((f"{dataset.name} in {dataset.source}:", dataset.path, key, path, name))
    unasked: dict[str, list[str]] = {}
    for flag, path, key, custom, name in files:
        if problem := _other_form(_Prompts(path, key), args, custom, (name or "").strip()):
            unasked.setdefault(problem, []).append(f"{flag} {path}")
    for problem, where in unasked.items():
        yield warning(f"the prompts of {' and '.join(where)} {problem}")


def _other_form(prompts: _Prompts, args: argparse.Namespace, custom: str | None, rm_type: str) -> str:
    """What prompts ask for other than the reward reads; empty where they ask for it or nobody knows."""
    ours, dapo = custom == OUR_REWARD, custom is None and rm_type == "dapo"
    boxed = custom is None and rm_type in ("math", "deepscaler")
    if not (ours or dapo or boxed) or not prompts.any():
        return ""
    template = _chat_template(Path(args.hf_checkpoint)) if args.hf_checkpoint else ""
    asks_answer, asks_box = (bool(form.search(template)) or prompts.match(form) for form in (_ANSWER, _BOX))
    if not asks_answer and (dapo or (ours and not asks_box)):
        reward = OUR_REWARD if ours else f"--rm-type {rm_type}"
        return (
            f"never ask for a line 'Answer: …', which {reward} reads, so that right answers in another form score as"
            " wrong; ask for it"
        )
    if boxed and asks_answer and not asks_box:
        return (
            rf"ask for a line 'Answer: …', and --rm-type {rm_type} reads \boxed{{…}}; use --rm-type dapo, or ask for"
            " the box"
        )
    return ""


class _Prompts:
    """The prompts of a data file as texts, read until one matches; broken files have none, for ``data`` to say."""

    def __init__(self, path: str, key: str) -> None:
        (self.path, self.bounds), self.key = sliced_path(path), key

    def any(self) -> bool:
        return next(iter(self), None) is not None

    def match(self, pattern: re.Pattern[str]) -> bool:
        return any(pattern.search(text) for text in self)

    def __iter__(self) -> Iterator[str]:
        if not Path(self.path).is_file():
            return
        with contextlib.suppress(OSError, ValueError, ModuleNotFoundError):
            for _, row in chosen_rows(self.path, self.bounds):
                if (text := "\n".join(_texts(row.get(self.key)))) != "":
                    yield text


def _texts(prompt: Any) -> Iterator[str]:
    """The texts of a prompt: a string, or messages whose content is a string or a list of parts."""
    if isinstance(prompt, str):
        yield prompt
    elif isinstance(prompt, dict):
        yield from _texts(prompt.get("content"))
        yield from _texts(prompt.get("text"))
    elif isinstance(prompt, list):
        for part in prompt:
            yield from _texts(part)


REWARD_RULES = (reward_names, deepscaler, prompts)
