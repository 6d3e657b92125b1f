"""``slime-fipo check`` against slime: its parser's verdicts, the rewards and rollout functions that the rules speak of,
and silence on the launch scripts that slime ships.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from slime_fipo.check.command import parse_command
from slime_fipo.check.flag_rules import TRAIN_ONLY_ROLLOUTS
from slime_fipo.check.foreign_flags import REPLACEMENTS
from slime_fipo.check.preflight import check_command
from slime_fipo.check.reward_rules import READ_OUTSIDE_THE_BOX, REWARDS, known_rewards
from slime_fipo.check.slime_parser import CONTROL, judge, run_parser

from ..check.commands import without
from .conftest import python
from .slimes_scripts import train_command
from .test_parser import BATCH, FIPO, FLAGS, MODEL

# name: (flags behind a sound command's, those taken out of it, in the parser's sentence)
REFUSED = {
    "a context as long as the prompt": (
        ("--rollout-max-context-len", "64", "--rollout-max-prompt-len", "64"),
        (),
        "must be smaller than args.rollout_max_context_len (64)",
    ),
    "a KL loss without a reference": (("--use-kl-loss",), ("--ref-load",), "os.path.exists(args.ref_load)"),
    "a value of another kind": (("--rollout-seed", "many"), (), "argument --rollout-seed: invalid int value: 'many'"),
    "a choice that there is not": (("--optimizer", "lion"), (), "argument --optimizer: invalid choice: 'lion'"),
    "another model": (("--num-layers", "3"), (), "num_hidden_layers in hf config 2 is not equal to num_layers 3"),
    "two KL terms": (("--kl-coef", "0.1", "--kl-loss-coef", "0.1"), (), "Only one of kl_coef and kl_loss_coef"),
    "saving nowhere": (("--save-interval", "3"), (), "'--save' is required"),
}
FOREIGN = [word for name in REPLACEMENTS for word in (f"--{name}", "1")]


def sound(folder: Path) -> list[str]:
    return [*FLAGS, *BATCH, "--colocate", "--hf-checkpoint", str(folder), "--ref-load", str(folder)]


@pytest.fixture(scope="module")
def outcomes(slime, version, megatron, tmp_path_factory):
    """Of every case above and of slime's own scripts with FIPO's flags, by one process; and the commands."""
    folder, root = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("root")
    (folder / "config.json").write_text(json.dumps(MODEL))
    (folder / "latest_checkpointed_iteration.txt").write_text("release")
    train = ["python3", "-m", "slime_fipo", str(slime / "train.py")]
    commands = {name: [*train, *without(sound(folder), drop), *add] for name, (add, drop, _) in REFUSED.items()}
    commands["sound"] = [*train, *sound(folder)]
    commands["sound with FIPO"] = [*train, *sound(folder), *FIPO]
    commands["foreign"] = [*train, *sound(folder), *FOREIGN]
    commands["ignored"] = [*train, *sound(folder), "--save", "a", "--save-interval", "10", "20", "--no-such", "3"]
    commands["help"] = [*train, "--help"]
    if version != "v0.3.0":  # which wants an SGLang older than the installed one
        commands |= slimes_own(slime, root)
    cases = {
        name: {"wrapper": True, "arguments": without(words[4:], ("--hf-checkpoint",) if name.endswith(".sh") else ())}
        for name, words in commands.items()
    }
    cases["control"] = {"wrapper": False, "arguments": CONTROL}
    if version == "v0.3.0":
        for case in cases.values():
            case["arguments"] = [*case["arguments"], "--debug-train-only"]
    return commands, run_parser(cases, [slime, megatron], time_limit=1200)


def slimes_own(slime: Path, root: Path) -> dict[str, list[str]]:
    """slime's launch scripts with FIPO's flags and several steps per rollout; the reference models that they name."""
    found = {}
    for script in sorted([*(slime / "scripts").rglob("*.sh"), *(slime / "examples").rglob("*.sh")]):
        if script.parent.name == "models" or (words := train_command(slime, script)) is None or len(words) < 60:
            continue
        words = [words[0], words[1], *(f"{root}{word}" if word.startswith("/") else word for word in words[2:])]
        if "--ref-load" in words:
            reference = Path(words[words.index("--ref-load") + 1])
            reference.mkdir(parents=True, exist_ok=True)
            (reference / "latest_checkpointed_iteration.txt").write_text("release")
        words = without(words, ("--global-batch-size", "--loss-type", "--num-steps-per-rollout"))
        words = [words[0], "-m", "slime_fipo", *words[1:], *FIPO, "--num-steps-per-rollout", "4"]
        found[str(script.relative_to(slime))] = words
    assert len(found) >= 35
    return found


def verdict_of(outcomes, slime: Path, name: str):
    commands, result = outcomes
    cases = {"command": result["cases"][name], "control": result["cases"]["control"]}
    return judge(parse_command(commands[name]), slime, {**result, "cases": cases})


@pytest.mark.parametrize("name", ["sound", "sound with FIPO"])
def test_slime_takes_a_sound_command(name, outcomes, slime):
    verdict = verdict_of(outcomes, slime, name)
    assert "takes the command" in verdict.summary and verdict.findings == ()


@pytest.mark.parametrize("name", REFUSED)
def test_slimes_refusal_is_an_error_in_its_own_words(name, outcomes, slime):
    verdict = verdict_of(outcomes, slime, name)
    assert [(f.severity, REFUSED[name][2] in f.message) for f in verdict.findings] == [("error", True)], verdict
    assert "\n" not in verdict.findings[0].message


def test_slime_ignores_every_flag_in_the_table_of_foreign_ones(outcomes, slime):
    commands, result = outcomes
    case = result["cases"]["foreign"]
    assert case["status"] == 0, case["output"][-2000:]
    first = len(commands["foreign"]) - 4 - len(FOREIGN)
    assert {first + 2 * i for i in range(len(REPLACEMENTS))} <= set(case["ignored"])
    assert verdict_of(outcomes, slime, "foreign").findings == (), "the table says it already"


def test_replacements_are_flags(outcomes):
    listed = set(re.findall(r"--[a-z][a-z0-9-]*", outcomes[1]["cases"]["help"]["output"]))
    named = {flag for advice in REPLACEMENTS.values() for flag in re.findall(r"--[a-z][a-z0-9-]*", advice)}
    assert named - listed == {"--sglang-mem-fraction-static"}  # SGLang's own parser has no help


def test_what_slime_ignores_is_a_warning(outcomes, slime):
    messages = [f"{f.severity} {f.message}" for f in verdict_of(outcomes, slime, "ignored").findings]
    assert [message.split(" belongs to")[0].split(" is no")[0] for message in messages] == [
        "warning '20'",
        "warning --no-such",
    ]


# What is true of scripts that slime ships, with FIPO's flags behind them.
TRUE_OF_SLIMES = (
    "has no per-token PPO ratio",
    "leaves FIPO no advantages",
    "Number of layers should be divisible by the pipeline-model-parallel size",
    "--custom-config-path examples/",  # relative to slime's folder, where the check does not run
    "os.path.exists(args.ref_load)",  # a path of the user's that is a variable there
    "--sglang-",  # of another SGLang than the installed one
)


def test_silent_on_slimes_own_scripts(outcomes, slime, version):
    if version == "v0.3.0":
        pytest.skip("slime v0.3.0 wants an SGLang older than the installed one")
    commands, _ = outcomes
    scripts = [name for name in commands if name.endswith(".sh")]
    said = {name: [f.message for f in verdict_of(outcomes, slime, name).findings] for name in scripts}
    false = {n: m for n, found in said.items() for m in found if not any(true in m for true in TRUE_OF_SLIMES)}
    assert false == {}
    assert sum(not found for found in said.values()) >= 20, said


# What our rules say of them: missing files and departures from the recipe, which are true, and nothing about flags.
ABOUT_FLAGS = (
    "is no flag",
    "another framework's flag",
    "no reward of slime's",
    "scores every right answer as wrong",
    "never ask for a line",
    "cannot evaluate",
    "--group-rm",
    "leaves no token",
    "--allgather-cp",
    "does not divide --num-layers",
)


def test_our_rules_are_silent_on_slimes_own_flags(slime, tmp_path):
    for name, words in slimes_own(slime, tmp_path).items():
        if "--allgather-cp" in words:
            checkpoint = Path(words[words.index("--hf-checkpoint") + 1])
            checkpoint.mkdir(parents=True, exist_ok=True)
            (checkpoint / "config.json").write_text('{"architectures": ["GlmMoeDsaForCausalLM"]}')
        found = [f.message for f in check_command(parse_command(words))[0]]
        false = [m for m in found if any(about in m for about in ABOUT_FLAGS)]
        if "glm4.7-30B-A3B" in name:  # 47 layers on two stages, which Megatron refuses too
            false = [m for m in false if "does not divide --num-layers 47" not in m]
        assert false == [], name


# -- what the rules say of slime's rewards and rollout functions --

REWARDS_PROGRAM = """
import asyncio, importlib, json, sys
from argparse import Namespace
from slime.rollout.rm_hub import async_rm
from slime.utils.types import Sample

RIGHT = {
    "dapo": "Answer: 34",
    "math": "so \\\\boxed{34}",
    "deepscaler": "<think>hm</think> \\\\boxed{34}",
}

def score(name, response):
    args = Namespace(custom_rm_path=None, rm_type=name, rm_url=None)
    reward = asyncio.run(async_rm(args, Sample(prompt="", response=response, label="34")))
    return float(reward["acc"] if isinstance(reward, dict) else reward)

def known(name):
    if name == "remote_rm":
        return True
    try:
        score(name, "34")
    except NotImplementedError:
        return False
    except Exception:  # known, but this sample lacks what it reads
        return True
    return True

def evaluates(path):
    module, _, name = path.rpartition(".")
    try:
        function = getattr(importlib.import_module(module), name)
    except ImportError:
        return None
    try:
        function(Namespace(rollout_global_dataset=True), 0, None, evaluation=True)
    except (AssertionError, ValueError) as error:
        return False
    return True

print(json.dumps({
    "plain": {name: score(name, right) for name, right in RIGHT.items()},
    "boxed": {
        name: [score("boxed_" + name, r) for r in (*RIGHT.values(), "34", "Answer: \\\\boxed{34}")] for name in RIGHT
    },
    "without_thinking": score("deepscaler", "so \\\\boxed{34}"),
    "known": {name: known(name) for name in json.loads(sys.argv[1])},
    "evaluates": {path: evaluates(path) for path in json.loads(sys.argv[2])},
}))
"""


@pytest.fixture(scope="module")
def rewards(slime, tmp_path_factory):
    (program := tmp_path_factory.mktemp("rewards") / "rewards.py").write_text(REWARDS_PROGRAM)
    names = json.dumps([*REWARDS, "gsm8k", "dpao"])
    run = python([program, names, json.dumps(TRAIN_ONLY_ROLLOUTS)], slime)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_a_box_taken_off_makes_every_right_answer_wrong(rewards):
    assert rewards["plain"] == dict.fromkeys(READ_OUTSIDE_THE_BOX, 1.0)
    assert all(score == 0 for scores in rewards["boxed"].values() for score in scores)
    assert set(rewards["boxed"]) == set(READ_OUTSIDE_THE_BOX)


def test_deepscaler_wants_the_end_of_thinking(rewards):
    assert rewards["without_thinking"] == 0


def test_known_rewards_are_slimes(rewards, slime):
    assert {name for name, known in rewards["known"].items() if known} == set(REWARDS)
    assert known_rewards(slime) == REWARDS


def test_rollout_functions_that_only_train(rewards):
    assert rewards["evaluates"] == dict.fromkeys(TRAIN_ONLY_ROLLOUTS, False)
