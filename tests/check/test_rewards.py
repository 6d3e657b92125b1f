"""``slime-fipo check`` on slime's rewards by name, and on prompts that ask for another form than they read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slime_fipo.check.derived import OUR_REWARD
from slime_fipo.check.reward_rules import REWARDS, known_rewards

from ..scripts.bash import flags, train_arguments
from .commands import DATA, Broken, expect, flag, messages, without

OURS = (
    "--custom-rm-path",
    "--overlong-buffer-len",
    "--overlong-penalty-factor",
    "--reward-key",
    "--eval-reward-key",
    "--dynamic-sampling-filter-path",
    "--custom-eval-rollout-log-function-path",
)
BOX, ANSWER, NEITHER = "Put it into \\boxed{}.", "End with 'Answer: N'.", "What is 1 + 1?"


def by_name(name: str, *more: str) -> tuple[str, ...]:
    return flag("--rm-type", name, *more)


def rows(text: str) -> str:
    return json.dumps({"prompt": [{"role": "user", "content": text}], "label": "2"}) + "\n"


DAPO = ("--reward-key", "score", "--eval-reward-key", "acc")
BROKEN = {
    "a reward that slime does not have": Broken(
        "--rm-type gsm8k is no reward of slime's", "dapo, deepscaler, f1, gpqa, ifbench, math", by_name("gsm8k"), OURS
    ),
    "a misspelt reward": Broken("--rm-type dpao is no reward", "dapo, deepscaler", by_name("dpao"), OURS),
    "a box around a reward that slime does not have": Broken(
        "--rm-type boxed_gsm8k is no reward", "dapo, deepscaler", by_name("boxed_gsm8k"), OURS
    ),
    "boxed math": Broken(
        "--rm-type boxed_math scores every right answer as wrong", "use math", by_name("boxed_math"), OURS
    ),
    "boxed DAPO": Broken(
        "--rm-type boxed_dapo scores every right answer as wrong", "use dapo", by_name("boxed_dapo", *DAPO), OURS
    ),
    "boxed deepscaler": Broken(
        "--rm-type boxed_deepscaler scores every right answer as wrong",
        "use deepscaler",
        by_name("boxed_deepscaler"),
        OURS,
    ),
    "deepscaler with a base model": Broken(
        "--rm-type deepscaler gives 0 to every response without </think>",
        "Qwen3-4B-Base is a base model; use math",
        by_name("deepscaler"),
        OURS,
        error=False,
    ),
    "deepscaler with thinking turned off": Broken(
        "--rm-type deepscaler gives 0",
        "turns thinking off",
        by_name("deepscaler", "--apply-chat-template-kwargs", '{"enable_thinking": false}'),
        OURS,
        error=False,
    ),
    "deepscaler with a template that knows no thoughts": Broken(
        "--rm-type deepscaler gives 0",
        "the chat template of",
        by_name("deepscaler", "--hf-checkpoint", "FILE:models/instruct"),
        OURS,
        write={
            "models/instruct/config.json": "{}",
            "models/instruct/tokenizer_config.json": '{"chat_template": "{{ messages }}"}',
        },
        error=False,
    ),
    "a benchmark's reward that slime does not have": Broken(
        "rm_type gsm8k of gsm in --eval-config",
        "dapo, deepscaler",
        by_name("math", "--eval-config", "FILE:e.yaml"),
        (*OURS, "--eval-prompt-data"),
        write={"gsm.jsonl": rows(BOX), "e.yaml": "datasets: [{name: gsm, path: ROOT/gsm.jsonl, rm_type: gsm8k}]\n"},
    ),
    "prompts that never ask for our reward's form": Broken(
        f"{DATA} never ask for a line 'Answer: …', which {OUR_REWARD} reads",
        "ask for it",
        file=(DATA, rows(NEITHER) * 3),
        error=False,
    ),
    "prompts that never ask for DAPO's form": Broken(
        f"{DATA} never ask for a line 'Answer: …', which --rm-type dapo reads",
        "ask for it",
        by_name("dapo", *DAPO),
        OURS,
        file=(DATA, rows(BOX)),
        error=False,
    ),
    "prompts that ask for an answer where a box is read": Broken(
        f"{DATA} ask for a line 'Answer: …', and --rm-type math reads \\boxed{{…}}",
        "use --rm-type dapo",
        by_name("math"),
        OURS,
        file=(DATA, rows(ANSWER)),
        error=False,
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_finds_the_planted_fault(name, tmp_path, capsys):
    expect(BROKEN[name], tmp_path, capsys)


@pytest.mark.parametrize("name", [name for name in REWARDS if name not in ("deepscaler", "dapo")])
def test_silent_on_slimes_rewards(name, sane):
    assert messages([*without(sane, OURS), *by_name(name)]) == []
    if name != "math":
        assert messages([*without(sane, OURS), *by_name(f"boxed_{name}")]) == []


def test_silent_on_deepscaler_with_a_model_that_thinks(sane):
    folder = Path(sane[sane.index("--hf-checkpoint") + 1])
    folder = folder.rename(folder.with_name("Qwen3-4B"))
    words = [*without(sane, OURS), *by_name("deepscaler", "--hf-checkpoint", str(folder))]
    assert messages(words) == []
    (folder / "chat_template.jinja").write_text("<think>\n</think>")
    assert messages(words) == []


@pytest.mark.parametrize(
    ("reward", "prompts"),
    [
        ("ours", [NEITHER, NEITHER, ANSWER]),  # one that asks is enough
        ("ours", [BOX]),
        ("ours", ["The last line: Answer : N"]),
        ("dapo", ["answer: N"]),
        ("math", [BOX]),
        ("math", [NEITHER]),  # chat models box without being asked
        ("math", ["Answer: \\boxed{N}"]),
        ("f1", [NEITHER]),
    ],
)
@pytest.mark.parametrize("parquet", [False, True])
def test_silent_on_prompts_that_ask(reward, prompts, parquet, sane, tmp_path):
    path = tmp_path / ("data.parquet" if parquet else "data.jsonl")
    if parquet:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet as files

        table = {"prompt": [[{"role": "user", "content": text}] for text in prompts], "label": ["2"] * len(prompts)}
        files.write_table(pyarrow.table(table), path)
    else:
        path.write_text("".join(map(rows, prompts)))
    words = sane if reward == "ours" else [*without(sane, OURS), *by_name(reward, *(DAPO if reward == "dapo" else ()))]
    assert messages([*words, "--prompt-data", str(path)]) == []


def test_a_chat_template_may_ask(sane, tmp_path):
    (tmp_path / "data.jsonl").write_text(rows(NEITHER))
    words = [*sane, "--prompt-data", str(tmp_path / "data.jsonl")]
    assert len(messages(words)) == 1
    template = {"chat_template": [{"name": "default", "template": "put your final answer within \\boxed{}."}]}
    (Path(sane[sane.index("--hf-checkpoint") + 1]) / "tokenizer_config.json").write_text(json.dumps(template))
    assert messages(words) == []


def test_prompts_of_every_file_are_named_in_one_line(sane):
    named = flags(train_arguments(sane))
    paths = [named["--prompt-data"][0], *named["--eval-prompt-data"][1::2]]
    for path in paths:
        Path(path).write_text(rows(NEITHER))
    found = messages(sane)
    assert len(found) == 1 and all(path in found[0] for path in paths)


def test_rewards_are_read_from_the_checkout(tmp_path):
    hub = tmp_path / "slime" / "rollout" / "rm_hub" / "__init__.py"
    hub.parent.mkdir(parents=True)
    hub.write_text(
        'async def async_rm(rm_type):\n    if rm_type == "new":\n        return 1\n    elif rm_type == "old": ...\n'
    )
    assert known_rewards(tmp_path) == ("new", "old")
    hub.write_text("table = {}\n")
    assert known_rewards(tmp_path) == known_rewards(None) == REWARDS
    hub.write_text("def (")
    assert known_rewards(tmp_path) == REWARDS
