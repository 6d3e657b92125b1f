"""What means to be a flag of ours is never ignored: spellings made from the list of flags, and other names' table."""

import re
import shlex
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slime_fipo.check.command import _parser, parse_command
from slime_fipo.plugin.arguments import OWN_FLAGS
from slime_fipo.plugin.spelling import (
    OTHER_NAMES,
    PULL_REQUEST,
    SWIFT,
    TRL,
    TURN_ON,
    VERL,
    correction,
    key_correction,
    misspelt_flags,
)

from ..scripts.bash import LAUNCH_SCRIPTS, LOSSES, dry_run, train_arguments

PAGE = Path(__file__).resolve().parents[2] / "docs" / "slime.md"
PARSER = _parser()
FLAGS = st.sampled_from(sorted(OWN_FLAGS))
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def found(*words: str) -> list[str]:
    return [message for _, message in misspelt_flags(words, PARSER, OWN_FLAGS)]


@st.composite
def respelt(draw) -> tuple[str, str]:
    """A flag of ours, and the same letters with other dashes, separators and cases."""
    flag = draw(FLAGS)
    words = flag[2:].split("-")
    separators = [draw(st.sampled_from(["-", "_", ".", "", "--"])) for _ in words]
    cases = [draw(st.sampled_from([str.lower, str.upper, str.title])) for _ in words]
    name = "".join(case(word) + mark for case, word, mark in zip(cases, words, separators, strict=True))
    dashes = draw(st.sampled_from(["-", "--", "---", "–", "—", "−−"]))
    return flag, dashes + name[: len(name) - len(separators[-1])]


@settings(max_examples=300, deadline=None)
@given(respelt(), st.sampled_from(["", "=3", "=false"]))
def test_every_other_spelling_is_refused_and_the_right_one_named(pair, value):
    flag, spelling = pair
    if spelling in OWN_FLAGS:
        return
    (message,) = found(f"{spelling}{value}", "3")
    assert message.startswith(f"{spelling} is ") and f" {flag}" in message
    assert message.endswith(f"write {flag}") or "-loss" in flag


@st.composite
def mistyped(draw) -> tuple[str, str]:
    """A flag of ours, and the same with one letter wrong, missing, doubled or swapped with the next."""
    flag = draw(FLAGS)
    name = flag[2:]
    at = draw(st.integers(0, len(name) - 1))
    letter = draw(st.sampled_from(LETTERS))
    edits = {
        "wrong": name[:at] + letter + name[at + 1 :],
        "missing": name[:at] + name[at + 1 :],
        "more": name[:at] + letter + name[at:],
        "swapped": name[:at] + name[at : at + 2][::-1] + name[at + 2 :],
    }
    mark = draw(st.sampled_from(["-", "_"]))
    return flag, "--" + edits[draw(st.sampled_from(sorted(edits)))].replace("-", mark)


@settings(max_examples=500, deadline=None)
@given(mistyped())
def test_every_slip_of_the_keyboard_is_refused_and_the_right_flag_named(pair):
    flag, slip = pair
    if slip in OWN_FLAGS:
        return
    (message,) = found(slip, "3")
    twins = {flag, flag.replace("--no-", "--"), flag.replace("--", "--no-", 1)} & OWN_FLAGS
    assert any(re.search(rf" {twin}\b(?!-)", message) for twin in twins), message


@pytest.mark.parametrize("flag", sorted(OWN_FLAGS))
def test_the_right_spellings_are_not_touched(flag):
    takes_value = PARSER._option_string_actions[flag].nargs != 0
    assert found(flag, *["3"] * takes_value) == []
    if takes_value:
        assert found(f"{flag}=3") == []
        assert found(flag, "3", "4") == [f"{flag} takes one value, and 4 is left over; drop it"]


@pytest.mark.parametrize("flag", sorted(f for f in OWN_FLAGS if PARSER._option_string_actions[f].nargs == 0))
@pytest.mark.parametrize("text", ["false", "False", "no", "off", "0", "true", "1"])
def test_a_switch_with_a_value_is_refused(flag, text):
    """``--fipo-clip-high-only false``, as ms-swift has it, would turn it on."""
    for words in ((flag, text), (f"{flag}={text}",)):
        (message,) = found(*words)
        assert message.startswith(f"{flag} takes no value; ")
        if f"--no-{flag[2:]}" in OWN_FLAGS and text.lower() in ("false", "no", "off", "0"):
            assert message.endswith(f"write --no-{flag[2:]}")


MEANT = {
    "--fipo_clip_range 0.3": "use --fipo-clip-ratio",
    "--fipo_safety_threshold 4": "use --fipo-safety-thresh",
    "--fipo_detach_weight true": "drop it: weights are always detached here",
    "--delta 10": "use --fipo-dual-clip-c",
    "--soft_cache_length 4": "use --overlong-buffer-len",
    "actor_rollout_ref.actor.policy_loss.decay_rate=64": "use --fipo-decay-rate",
    "+actor_rollout_ref.actor.policy_loss.safety_thresh=3": "use --fipo-safety-thresh",
    "--actor_rollout_ref.actor.clip_ratio_c=3": "use --fipo-dual-clip-c",
    "--decay-rate 64": "use --fipo-decay-rate",
    "--future_kl_window=-1": "drop it: Future-KL always runs",
    "--future-kl-decay-rate 64": "did you mean --fipo-decay-rate?",
    "reward_model.overlong_buffer.len=4": "use --overlong-buffer-len",
    "--overlong-bufer-len 4": "did you mean --overlong-buffer-len?",
    "--overlong-buffer 4": "did you mean --overlong-buffer-len?",
    "--fipo-decay-rat 4": "did you mean --fipo-decay-rate?",
    "--clip-ratio-low 0.2": "use --eps-clip (PPO's clip; FIPO's is --fipo-clip-ratio-low)",
    "--dual-clip-c 4": "did you mean --fipo-dual-clip-c?",
    "--max-dual-clipped-tokens 4": "did you mean --fipo-max-dual-clipped-tokens?",
    "--fipo-clip 4": "did you mean --fipo-clip-ratio?",
    "--fipo-max 4": "did you mean --fipo-max-dual-clipped-tokens?",
    "--fipo-no-such-thing 4": "there are --fipo-allow-single-step, ",
    "--no-fipo-log-detail": "--fipo-log-detail is off unless it is given",
    "--loss_type fipo_loss": f"use {TURN_ON}",
    "--loss_type=fipo": f"use {TURN_ON}",
    "-loss-type fipo_loss": f"use {TURN_ON}",
    "policy_loss.loss_mode=future_kl": f"use {TURN_ON}",
    "--policy-loss.loss-mode future_kl": f"use {TURN_ON}",
    "--fipo": f"use {TURN_ON}",
    "--colocate '--loss-type fipo_loss --fipo-preset 7b'": "take the quotes off",
    "--loss-type fipo_loss '--fipo-decay-rate 64'": "take the quotes off",
    "--fipo-preset 7b '--fipo-decay-rate 64'": "take the quotes off",
}


@pytest.mark.parametrize("words", MEANT)
def test_what_is_meant_is_said(words):
    (message,) = found(*shlex.split(words))
    assert MEANT[words] in message


@pytest.mark.parametrize(
    "words",
    [
        "--wandb-group=--fipo_decay_rate",
        "--wandb-group fipo_decay_rate=64",
        "--wandb-notes '--fipo-preset 7b against the baseline'",
        "--wandb-group '--fipo_decay_rate 64'",
        "--prompt-data fipo_decay_rate.jsonl",
        "--eval-prompt-data fipo_preset=7b fipo_decay_rate=64 --colocate",
        "--spec a 'b --fipo_decay_rate'",
        "--fipo-preset 7b '' ' ' --colocate ''",
        "--fipo-dual-clip-c -3 --fipo-clip-ratio-low=-0.1",
        "--loss_type policy_loss --kl-loss-type k1",
        "--lr-decay-rate 3 --log-probs-chunk-size 4 --eps-clip-high 0.28",
    ],
)
def test_values_that_look_like_flags_are_left_alone(words):
    assert found(*shlex.split(words)) == []


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("script", LAUNCH_SCRIPTS, ids=lambda script: script.stem)
def test_silent_on_our_own_scripts(script, loss):
    assert found(*train_arguments(dry_run(script, LOSS=loss))) == []


def test_check_says_it_once():
    command = parse_command(["--loss-type", "fipo_loss", "--fipo_decay_rate", "64", "--overlong-bufer-len", "4"])
    assert [message.split(" is ")[0] for message in command.misspelt_own] == [
        "--fipo_decay_rate",
        "--overlong-bufer-len",
    ]
    assert command.misspelt == ()


# -- keys of YAML files --


@settings(max_examples=200, deadline=None)
@given(respelt())
def test_every_other_spelling_of_a_key_is_refused(pair):
    flag, spelling = pair
    key = flag.replace("--no-", "--")[2:].replace("-", "_")
    written = spelling.lstrip("-–—−")
    assert key_correction(written, OWN_FLAGS) == f"{written} is not a setting; write {key}"


@pytest.mark.parametrize("key", ["decay_rate", "chunk_size", "delta", "clip_ratio_c", "loss_type", "eps_clip_high"])
def test_keys_for_a_users_own_functions_are_left_alone(key):
    assert key_correction(key, OWN_FLAGS) == ""


# -- names elsewhere --


def test_other_names_lead_to_flags_that_there_are():
    for other in OTHER_NAMES:
        assert other.flag in (*OWN_FLAGS, TURN_ON, "--eps-clip", "--eps-clip-high", "") and (other.flag or other.note)


@pytest.mark.parametrize("other", OTHER_NAMES, ids=lambda other: other.name)
def test_every_other_name_is_translated(other):
    if other.framework == PULL_REQUEST:
        assert other.name == other.flag  # the same names, of which ours are a superset
        return
    name, _, value = other.name.replace(" ", "=").partition("=")
    for written in {name, name if name.startswith("--") else f"--{name}"}:
        message = correction(written, OWN_FLAGS, value)
        assert (other.flag or other.note) in message, message
        assert message.startswith(f"{written} is ")


COLUMNS = {"PR #1801": PULL_REQUEST, "verl recipe": VERL, "ms-swift": SWIFT, "TRL": TRL}


def table_of_the_page() -> dict[tuple[str, str], set[str]]:
    """(our flag, column) -> the names in that cell."""
    cells = {}
    for table in re.findall(r"^\| flag \| meaning .*\n(?:\|.*\n)+", PAGE.read_text(encoding="utf-8"), re.MULTILINE):
        columns, _, *rows = (
            [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.splitlines()
        )
        for row in (dict(zip(columns, cells_of_row, strict=True)) for cells_of_row in rows):
            for flag in re.findall(r"`(--[^`]+)`", row["flag"]):
                named = {column: set(re.findall(r"`([^`]+)`", row.get(column, ""))) for column in COLUMNS}
                cells |= {(flag, column): names for column, names in named.items()}
    return cells


def test_the_pages_table_shows_these_names():
    cells = table_of_the_page()
    expected = {key: set() for key in cells}
    for other in OTHER_NAMES:
        column = next(name for name, framework in COLUMNS.items() if framework == other.framework)
        if (other.flag, column) in expected:
            expected[other.flag, column].add(other.name)
    assert {flag for flag, _ in cells} >= {TURN_ON, "--overlong-buffer-len"}
    assert cells == expected
    page = PAGE.read_text(encoding="utf-8")
    assert not [other.name for other in OTHER_NAMES if f"`{other.name}`" not in page]
