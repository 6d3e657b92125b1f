"""The verdict on every row of the table, with and without slime's verifier; spellings of generated integers."""

from __future__ import annotations

import importlib.util
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from slime_fipo.recipes.integer_answer import asks_for_box, final_integer, label_integer, read_integer
from slime_fipo.recipes.reward import NO_ANSWER, verify

from .answer_table import ANSWERS, PROMPTS


def finds_nothing(response: str, label: str) -> dict:
    return {"acc": False, "pred": NO_ANSWER}


def name(row) -> str:
    return f"{str(row[0])[:9]}-{row[1]}-{row[2][:30]}"


def test_the_table_is_long_enough():
    assert len(ANSWERS) >= 80
    assert sum(1 for *_, right in ANSWERS if not right) >= 40


@pytest.mark.parametrize("row", ANSWERS, ids=name)
def test_ours_alone(row):
    label, form, response, right = row
    verdict = verify(response, label, PROMPTS[form], finds_nothing)
    assert verdict.correct == right
    if right:
        assert verdict.answer == label_integer(label) and not verdict.unread


@pytest.fixture(scope="module")
def slimes(slime_root):
    file = slime_root / "slime" / "rollout" / "rm_hub" / "math_dapo_utils.py"
    spec = importlib.util.spec_from_file_location("math_dapo_utils", file)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module.compute_score


@pytest.mark.slime
@pytest.mark.parametrize("row", ANSWERS, ids=name)
def test_with_slimes_verifier(row, slimes):
    label, form, response, right = row
    verdict = verify(response, label, PROMPTS[form], slimes)
    assert verdict.correct == right
    assert verdict.second_look == (right and len(str(label)) <= 15 and not slimes(response, str(label))["acc"])


integers = st.integers(-(10**9), 10**9) | st.integers(-(10**40), 10**40)


@pytest.mark.slime
@given(answer=integers, label=integers | st.none(), before=st.text(max_size=40), after=st.sampled_from(["", "\n", " "]))
@example(answer=2**53, label=2**53 + 1, before="", after="")
def test_slimes_verdict_stays_on_plain_answers(answer, label, before, after, slimes):
    """DAPO's own form of label and answer; slime's verifier is right up to 15 digits."""
    label = answer if label is None else label
    response = f"{before}\nAnswer: {answer}{after}"
    verdict = verify(response, str(label), PROMPTS["answer"], slimes)
    assert verdict.correct == (answer == label)
    assert not verdict.second_look
    if len(str(label)) <= 15:
        assert verdict.correct == slimes(response, str(label))["acc"]


@pytest.mark.slime
@given(response=st.text("Answer:3450-.,=$ \n*\\boxed{}x"), label=st.integers(-99, 999))
def test_what_slime_calls_right_is_right(response, label, slimes):
    response = f"Answer: {response}"
    score = slimes(response, str(label))
    verdict = verify(response, str(label), PROMPTS["box"], slimes)
    assert verdict.correct >= score["acc"]
    first = read_integer(score["pred"])
    assert first in (None, str(label)) or not verdict.correct, "another integer stays wrong"


WRAPPED = [
    "{}",
    "**{}**",
    "${}$",
    "\\({}\\)",
    "\\boxed{{{}}}",
    "\\text{{{}}}",
    "x = {}",
    "{}.",
    " {} ",
    "`{}`",
    "{}\\%",
]


@given(integers, st.integers(0, 3), st.sampled_from(["", ",", "{,}", "\\,", " "]), st.lists(st.sampled_from(WRAPPED)))
def test_every_spelling_reads_as_its_integer(integer, zeros, separator, wrapping):
    digits = f"{abs(integer):,}".replace(",", separator)
    text = f"{'−' if integer < 0 else ''}{'' if separator else '0' * zeros}{digits}{'.' + '0' * zeros if zeros else ''}"
    for wrap in wrapping[:4]:
        text = wrap.format(text)
    if text.count("=") > 1 or re.search(r"[%.].*\d", text.replace(".0", "")):
        return
    assert read_integer(text) == str(integer)


@given(st.text("0123456789.,-+=$ *_\\boxed{}()/^%!x√²٣"))
def test_what_is_read_has_the_digits_of_the_text(text):
    integer = read_integer(text)
    if integer is not None:
        said = re.sub(r"[^0-9]", "", text.rpartition("=")[2])
        assert said.startswith(("0", integer.lstrip("-"))) or said.strip("0") == integer.strip("-0")
        assert not re.search(r"[/!√²٣]|\^(?!\{?\\circ)", text.rpartition("=")[2])
        assert text.count("{") == text.count("}")


@pytest.mark.parametrize(
    "unit", ["^\\circ}", "\\text{", "\\alpha", "A", "$", " cm", "1,", "1 ", "{,}000", "\\boxed{", "=", "0."]
)
@pytest.mark.parametrize("end", ["", "x", "34", "=3", "}"])
def test_long_input_ends(unit, end):
    """Exponential or quadratic matching would not come back from 100 kB."""
    text = unit * (10**5 // len(unit)) + end
    read_integer(text)
    read_integer(f"34{text}")
    final_integer(text, True, longest=len(text))
    final_integer(f"Answer: {text}", True, longest=2 * len(text))


def test_prompts_that_ask_for_a_box():
    assert {form: asks_for_box(prompt) for form, prompt in PROMPTS.items()} == {
        "answer": False,
        "box": True,
        "chat box": True,
        "neither": False,
    }
    assert not asks_for_box(None) and not asks_for_box([{"role": "user", "content": None}])


def test_labels_that_are_none_are_refused_at_the_reward():
    for label in ("0.5", "3/4", "", None, "7" * 200 + "x"):
        with pytest.raises(ValueError, match="is not an integer") as error:
            verify("Answer: 0", label, "", finds_nothing)
        assert len(str(error.value)) < 150
