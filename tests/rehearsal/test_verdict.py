"""What the verdict says of events and metrics that a run left."""

import json
from types import SimpleNamespace

import pytest
from torch.utils.tensorboard import SummaryWriter

from slime_fipo.algorithm import FipoConfig
from slime_fipo.check.command import parse_command
from slime_fipo.rehearsal.reward_trial import FORMS, chosen_form
from slime_fipo.rehearsal.verdict import Seen, judge
from slime_fipo.rehearsal.watch import FOLDER, record

STEPS = 2
COMMAND = ["python3", "-m", "slime_fipo", "train.py", "--loss-type", "fipo_loss", "--use-tensorboard"]
REWARD = {"name": "--custom-rm-path mine.reward", "label": "7", "asked": ["Answer: …"], "error": None, "prompt": ""}


@pytest.fixture
def left(tmp_path, monkeypatch):
    """A run's folder, with what slime's processes would leave in it."""

    def leave(name="first", *, status=0, log="", metrics=None, rollouts=3, start=0) -> Seen:
        folder = tmp_path / name
        (folder / "watch").mkdir(parents=True, exist_ok=True)
        (folder / "train.log").write_text(log)
        good = {
            "train/train_rollout_logprob_abs_diff": (0.004, 0.1),
            "train/fipo/influence_deviation": (0.0, 0.2),
            "train/loss": (0.1, 0.1),
        }
        with SummaryWriter(str(folder / "tensorboard")) as writer:
            for metric, values in (good | (metrics or {})).items():
                for step in range(start, start + rollouts * STEPS):
                    writer.add_scalar(metric, values[step % STEPS], step)
        return Seen.of(folder, status, folder / "train.log")

    monkeypatch.setenv(FOLDER, str(tmp_path / "first" / "watch"))
    (tmp_path / "first" / "watch").mkdir(parents=True)
    return leave


def lines(first, second=None, *flags: str):
    command = parse_command([*COMMAND, *flags])
    return {line.what: line for line in judge(command, FipoConfig(), first, second, STEPS)}


def test_a_good_run(left, tmp_path):
    (tmp_path / "first" / "checkpoint").mkdir()
    (tmp_path / "first" / "checkpoint" / "latest_checkpointed_iteration.txt").write_text("2")
    values = {"": 0.0} | {form: float(form == "Answer: …") for form in FORMS}
    record("reward", **REWARD, values=values)
    first = left()
    found = lines(first, left("resume", rollouts=1, start=6))
    assert {line.ok for line in found.values()} == {True}, found
    assert "gives 1 to 'Answer: 7'" in found["reward"].text
    assert "0.2000" in found["FIPO's influence weights"].text
    assert found["checkpoint"].text.endswith("at step 6")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({r"\\boxed{…}"[1:]: 1.0}, r"gives 0 to 'Answer: 7', which is what your prompts ask for; it reads '\boxed{7}'"),
        ({}, "gives 0 to 'Answer: 7', which is what your prompts ask for"),
    ],
)
def test_a_reward_that_does_not_read_what_the_prompts_ask_for(left, values, says):
    record("reward", **REWARD, values={"": 0.0} | dict.fromkeys(FORMS, 0.0) | values)
    line = lines(left())["reward"]
    assert line.ok is False
    assert says in line.text and "mine.reward" in line.text


@pytest.mark.parametrize(
    ("metric", "values", "what", "says"),
    [
        ("train/train_rollout_logprob_abs_diff", (0.3, 0.3), "log-probs of SGLang and Megatron", "MODEL_ARGS"),
        ("train/fipo/influence_deviation", (0.0, 0.0), "FIPO's influence weights", "did not move"),
    ],
)
def test_numbers_that_are_wrong(left, metric, values, what, says):
    line = lines(left(metrics={metric: values}))[what]
    assert line.ok is False and says in line.text


def test_a_checkpoint_that_starts_again_is_wrong(left, tmp_path):
    (tmp_path / "first" / "checkpoint").mkdir()
    (tmp_path / "first" / "checkpoint" / "latest_checkpointed_iteration.txt").write_text("2")
    first = left()
    line = lines(first, left("resume", rollouts=1, start=0))["checkpoint"]
    assert line.ok is False and "resumed at step 0, not at 6" in line.text


@pytest.mark.parametrize(
    ("groups", "ok", "says"),
    [
        ([([0, 1], True), ([1, 1], False)], True, "kept 1 of 1 groups with different rewards, dropped 1 of 1"),
        ([([0, 1], False), ([1, 1], False)], False, "kept 0 of 1"),
        ([([0, 1], True), ([1, 1], True)], False, "dropped 0 of 1"),
        ([([1, 1], True)], False, "never differ"),
    ],
)
def test_filters(left, groups, ok, says):
    for rewards, keep in groups:
        record("filter", path="mine.keeps", keep=keep, rewards=rewards, returned=None)
    line = lines(left(), None, "--dynamic-sampling-filter-path", "mine.keeps")["dynamic sampling"]
    assert line.ok is ok and says in line.text and "mine.keeps" in line.text


def test_the_first_error_of_the_users_own_is_named_with_its_place(left):
    log = "fine\n(Worker pid=1) Traceback\n(Worker pid=1) KeyError: 'difficulty'\nray.exceptions.RayTaskError: x\n"
    line = lines(left(status=1, log=log, metrics={}))["training"]
    assert line.ok is False
    assert "KeyError: 'difficulty'" in line.text and "train.log:3" in line.text


def test_a_hook_that_raised_is_named(left):
    record("hook", path="mine.hook", error="ValueError: no (mine.py:3)")
    record("hook", path="mine.logs")
    found = lines(
        left(), None, "--rollout-sample-hook-path", "mine.hook", "--custom-rollout-log-function-path", "mine.logs"
    )
    assert found["--rollout-sample-hook-path"].ok is False
    assert "ValueError: no (mine.py:3)" in found["--rollout-sample-hook-path"].text
    assert found["--custom-rollout-log-function-path"].text == "mine.logs was called 1 times"


def test_the_form_that_samples_get_is_one_that_the_prompt_asks_for():
    values = {"": 0.0, "Answer: …": 1.0, r"\boxed{…}": 1.0, "#### …": 0.0}
    assert chosen_form([r"\boxed{…}"], values) == r"\boxed{…}"
    assert chosen_form(["#### …"], values) == "Answer: …"
    assert chosen_form([], {"": 1.0, "Answer: …": 1.0}) is None


def test_events_of_all_processes_are_read(left, tmp_path):
    record("hook", path="a")
    (tmp_path / "first" / "watch" / "1.jsonl").write_text(json.dumps({"kind": "hook", "path": "b"}) + "\n")
    assert {event["path"] for event in left().events} == {"a", "b"}
    assert SimpleNamespace(**left().events[0]).kind == "hook"
