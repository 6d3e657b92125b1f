"""A launch script's command passes the rehearsal; the same with one fault does not, and the verdict names the fault."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from ..scripts.bash import EXAMPLES, LAUNCH_SCRIPTS, LOSSES
from .rehearsing import Rehearsed, Workspace, rehearse, row, workspace

QWEN3, QWEN2 = EXAMPLES / "run-qwen3-4B.sh", EXAMPLES / "run-qwen2.5-math-7B.sh"
ONE_RANK = {"TP": "1", "GPUS_PER_NODE": "1"}  # the least that trains; the launch scripts' own ranks are tested below


@pytest.fixture
def rehearsed(loop) -> Callable[[Workspace], Rehearsed]:
    def run(space: Workspace) -> Rehearsed:
        result = rehearse(os.environ["WHOLE_PYTHON"], loop.slime, loop.megatron, space.words, space.root)
        print(result.output)
        return result

    return run


def test_a_good_command_passes(rehearsed, tmp_path):
    space = workspace(tmp_path, QWEN3, **ONE_RANK)
    result = rehearsed(space)
    assert (result.status, result.wrong) == (0, [])
    assert {mark for mark, *_ in result.lines} == {"✓"}
    assert "nothing wrong" in result.output
    assert not Path(space.value("--save")).exists()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("script", LAUNCH_SCRIPTS, ids=lambda script: script.stem)
def test_every_launch_script_passes(rehearsed, tmp_path, script, loss):
    space = workspace(tmp_path, script, LOSS=loss)
    result = rehearsed(space)
    assert (result.status, result.wrong) == (0, [])
    unjudged = [what for mark, what, _ in result.lines if mark == "–"]
    assert unjudged == (["model"] if "qwen3.5" in script.stem else [])  # the stand-in for another family
    assert any(what == "FIPO's influence weights" for _, what, _ in result.lines) == (loss == "fipo_loss")


# -- twenty and more broken ones --


@dataclass(frozen=True)
class Broken:
    """``names``: what one wrong line of the verdict has to say. ``early``: it is found before slime starts."""

    change: Callable[[Workspace], None]
    names: tuple[str, ...]
    early: bool = False
    script: Path = QWEN3


REWARDS = """
async def raises(args, sample, **kwargs):
    raise ZeroDivisionError("no such answer")

async def reads_another_form(args, sample, **kwargs):
    return {"score": float(f"<final>{sample.label}</final>" in sample.response), "acc": 0}

async def has_no_score(args, sample, **kwargs):
    right = f"Answer: {sample.label}" in sample.response
    return {"points": float(right), "acc": right}

def is_not_async(args, sample, **kwargs):
    return {"score": 0.0, "acc": False}

async def gives_none(args, sample, **kwargs):
    return None
"""
FILTERS = """
from slime.rollout.filter_hub.base_types import DynamicFilterOutput

def keeps_nothing(args, samples, **kwargs):
    return DynamicFilterOutput(keep=False, reason="never")

def raises(args, samples, **kwargs):
    return DynamicFilterOutput(keep=samples[0].metadata["difficulty"] > 1)

def returns_a_dictionary(args, samples, **kwargs):
    return {"keep": False}

def forgets_to_return(args, samples, **kwargs):
    DynamicFilterOutput(keep=True)
"""
HOOKS = """
async def generate(args, sample, sampling_params):
    raise LookupError("no tool of that name")

def before_train_step(args, rollout_id, step_id, model, optimizer, opt_param_scheduler):
    raise LookupError("no such parameter")

def log_rollout(rollout_id, args, samples, metrics, seconds):
    raise LookupError("no such metric")

def log_evaluation(rollout_id, args, data, metrics):
    return len(data["aime25"]["rewards"]) > 0
"""


def module(name: str, text: str, *flags: str) -> Callable[[Workspace], None]:
    """The same command with flags that name something in a module of the user's."""

    def change(space: Workspace) -> None:
        space.module(name, text)
        space.set(*flags)

    return change


def reward(path: str) -> Callable[[Workspace], None]:
    """A reward of the user's in place of ours, and without the flags that ours alone reads."""

    def change(space: Workspace) -> None:
        space.module("mine", REWARDS)
        space.drop("--overlong-buffer-len")
        space.drop("--overlong-penalty-factor")
        space.set("--custom-rm-path", path)

    return change


def flag(*words: str) -> Callable[[Workspace], None]:
    return lambda space: space.set(*words)


def without(flag: str) -> Callable[[Workspace], None]:
    return lambda space: space.drop(flag)


def no_chat_template(space: Workspace) -> None:
    (space.checkpoint / "chat_template.jinja").unlink()


def no_prompts(space: Workspace) -> None:
    Path(space.value("--prompt-data")).unlink()


def third_row(text: str) -> Callable[[Workspace], None]:
    def change(space: Workspace) -> None:
        file = Path(space.value("--prompt-data"))
        rows = file.read_text().splitlines()
        file.write_text("\n".join([*rows[:2], text, *rows[3:]]) + "\n")

    return change


def no_benchmark(space: Workspace) -> None:
    Path(space.value("--eval-prompt-data")).unlink()


def wrong_eval_key(space: Workspace) -> None:
    path = space.value("--eval-prompt-data")
    text = f"eval:\n  datasets:\n    - name: aime24\n      path: {path}\n      input_kee: prompt\n"
    space.set("--eval-config", space.yaml("eval.yaml", text))


def fipo_off(space: Workspace) -> None:
    space.set("--custom-config-path", space.yaml("custom.yaml", "loss_type: policy_loss\n"))


def no_config(space: Workspace) -> None:
    (space.checkpoint / "config.json").unlink()


STRANGER = json.dumps(row("?", 1) | {"prompt": [{"role": "critic", "content": "Answer: 1"}]})

BROKEN = {
    # what is read before slime starts
    "unknown flag": Broken(flag("--use-magic"), ("--use-magic", "ignored"), early=True),
    "misspelt flag": Broken(flag("--fipo-decay-rat", "16"), ("--fipo-decay-rat", "--fipo-decay-rate"), early=True),
    "rotary base of another model": Broken(
        flag("--rotary-base", "10000"), ("--rotary-base 10000", "1000000"), early=True
    ),
    "no QK norm": Broken(without("--qk-layernorm"), ("--qk-layernorm", "add it"), early=True),
    "no QKV bias": Broken(without("--add-qkv-bias"), ("--add-qkv-bias", "add it"), early=True, script=QWEN2),
    "hidden size of another model": Broken(
        flag("--hidden-size", "4096"), ("--hidden-size 4096", "2560", "--hf-checkpoint"), early=True
    ),
    "batch that does not divide over ranks": Broken(
        flag("--global-batch-size", "64", "--actor-num-gpus-per-node", "3"),
        ("--global-batch-size 64", "3 data-parallel ranks"),
        early=True,
    ),
    "batch that does not divide a rollout": Broken(
        flag("--global-batch-size", "60"), ("--global-batch-size 60", "512 samples"), early=True
    ),
    "TP that does not divide the heads": Broken(
        flag("--tensor-model-parallel-size", "3", "--actor-num-gpus-per-node", "3"),
        ("--tensor-model-parallel-size 3", "--num-attention-heads 32"),
        early=True,
    ),
    "one optimizer step": Broken(
        flag("--global-batch-size", "512"), ("--global-batch-size 512", "FIPO without effect"), early=True
    ),
    "YAML that switches FIPO off": Broken(fipo_off, ("--custom-config-path", "loss_type", "policy_loss"), early=True),
    "label key": Broken(flag("--label-key", "answer"), ("--label-key answer", "row 1"), early=True),
    "input key": Broken(flag("--input-key", "question"), ("--input-key question", "row 1"), early=True),
    "prompts longer than the limit": Broken(
        flag("--rollout-max-prompt-len", "16"), ("--rollout-max-prompt-len is 16", "64 that are longer"), early=True
    ),
    "no chat template": Broken(no_chat_template, ("--apply-chat-template", "chat_template.jinja"), early=True),
    "no prompts": Broken(no_prompts, ("--prompt-data", "does not exist"), early=True),
    "no JSON": Broken(third_row('{"prompt": '), ("--prompt-data", "line 3"), early=True),
    "role that the template does not know": Broken(third_row(STRANGER), ("row 3", "no role critic"), early=True),
    "no benchmark": Broken(no_benchmark, ("--eval-prompt-data", "aime-2024.jsonl", "does not exist"), early=True),
    "wrong key in --eval-config": Broken(wrong_eval_key, ("--eval-config", "eval.yaml", "input_kee"), early=True),
    "no model": Broken(no_config, ("--hf-checkpoint", "config.json"), early=True),
    "module of the reward": Broken(
        reward("nowhere.reward"), ("--custom-rm-path nowhere.reward", "no module nowhere", "PYTHONPATH"), early=True
    ),
    "name in the reward's module": Broken(
        reward("mine.rewards"), ("--custom-rm-path mine.rewards", "mine.py has no rewards"), early=True
    ),
    # what slime has to run for
    "reward that raises": Broken(
        reward("mine.raises"),
        ("--custom-rm-path mine.raises", "ZeroDivisionError: no such answer", "mine.py:3"),
    ),
    "reward that reads another form": Broken(
        reward("mine.reads_another_form"),
        ("--custom-rm-path mine.reads_another_form", "gives 0 to 'Answer: ", "which is what your prompts ask for"),
    ),
    "reward without the key": Broken(
        reward("mine.has_no_score"),
        ("--custom-rm-path mine.has_no_score", "--reward-key score", "points"),
    ),
    "reward that is not async": Broken(
        reward("mine.is_not_async"),
        ("--custom-rm-path mine.is_not_async", "async def"),
    ),
    "reward of None": Broken(reward("mine.gives_none"), ("--custom-rm-path mine.gives_none", "None")),
    "filter that keeps nothing": Broken(
        module("filters", FILTERS, "--dynamic-sampling-filter-path", "filters.keeps_nothing"),
        ("--dynamic-sampling-filter-path filters.keeps_nothing", "kept 0 of"),
    ),
    "filter that raises": Broken(
        module("filters", FILTERS, "--dynamic-sampling-filter-path", "filters.raises"),
        ("--dynamic-sampling-filter-path filters.raises", "KeyError: 'difficulty'", "filters.py:8"),
    ),
    "filter that returns a dictionary": Broken(
        module("filters", FILTERS, "--dynamic-sampling-filter-path", "filters.returns_a_dictionary"),
        ("--dynamic-sampling-filter-path filters.returns_a_dictionary", "a dict", "DynamicFilterOutput"),
    ),
    "filter that forgets to return": Broken(
        module("filters", FILTERS, "--dynamic-sampling-filter-path", "filters.forgets_to_return"),
        ("--dynamic-sampling-filter-path filters.forgets_to_return", "nothing", "DynamicFilterOutput"),
    ),
    "generate function that raises": Broken(
        module("hooks", HOOKS, "--custom-generate-function-path", "hooks.generate"),
        ("--custom-generate-function-path hooks.generate", "LookupError: no tool of that name", "hooks.py:3"),
    ),
    "train-step hook that raises": Broken(
        module("hooks", HOOKS, "--custom-megatron-before-train-step-hook-path", "hooks.before_train_step"),
        (
            "--custom-megatron-before-train-step-hook-path hooks.before_train_step",
            "LookupError: no such parameter",
            "hooks.py:6",
        ),
    ),
    "log function that raises": Broken(
        module("hooks", HOOKS, "--custom-rollout-log-function-path", "hooks.log_rollout"),
        ("--custom-rollout-log-function-path hooks.log_rollout", "LookupError: no such metric", "hooks.py:9"),
    ),
    "evaluation logger that raises": Broken(
        module("hooks", HOOKS, "--custom-eval-rollout-log-function-path", "hooks.log_evaluation"),
        ("--custom-eval-rollout-log-function-path hooks.log_evaluation", "KeyError: 'aime25'", "hooks.py:12"),
    ),
    "architecture flag that no rule knows": Broken(
        flag("--rotary-percent", "0.5"), ("log-probs of SGLang and Megatron", "MODEL_ARGS")
    ),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_a_broken_command_is_found_and_named(rehearsed, tmp_path, broken):
    space = workspace(tmp_path, broken.script, **ONE_RANK)
    broken.change(space)
    result = rehearsed(space)
    assert result.status == (2 if "slime-fipo rehearse:" in result.output else 1)
    assert any(all(part in line for part in broken.names) for line in result.wrong), result.wrong
    if broken.early:
        assert "slime starts" not in result.output
    assert "Traceback" not in result.output
