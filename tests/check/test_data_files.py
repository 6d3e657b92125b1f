"""``slime-fipo check`` on data files: every row is read, and a label is judged as the reward takes it."""

from __future__ import annotations

import json
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slime_fipo.check import file_rules
from slime_fipo.check.command import parse_command
from slime_fipo.check.derived import OUR_REWARD
from slime_fipo.check.file_rules import data
from slime_fipo.recipes.integer_answer import label_integer

from ..recipes.answer_table import INTEGER_LABELS, OTHER_LABELS

ROWS = 150


def found(path: Path | str, *reward: str) -> list[str]:
    reward = reward or ("--custom-rm-path", OUR_REWARD)
    words = ["--prompt-data", str(path), "--input-key", "prompt", "--label-key", "label", *reward]
    return [f"{finding.severity}: {finding.message}" for finding in data(parse_command(words), None)]


def jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def row(label) -> dict:
    return {"prompt": "1 + 1", "label": label}


def parquet(path: Path, rows: list) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=50)
    return path


@pytest.mark.parametrize("write", [jsonl, parquet])
@pytest.mark.parametrize("label", ["3/4", "0.5", "x", "", None])
def test_one_bad_label_among_many_is_found_by_its_row(label, write, tmp_path):
    rows = [row("2")] * ROWS
    rows[119] = row(label)
    message = found(write(tmp_path / f"data.{write.__name__}", rows))
    assert len(message) == 1 and message[0].startswith("error: ")
    assert f"has the label {label!r} in row 120," in message[0] and "--custom-rm-path" in message[0]


def test_a_row_without_the_key_is_found(tmp_path):
    rows = [row("2")] * ROWS
    rows[119] = {"prompt": "1 + 1", "answer": "2"}
    (message,) = found(jsonl(tmp_path / "data.jsonl", rows))
    assert "--label-key label is not in every row" in message and "row 120 has answer, prompt" in message


def test_a_line_that_is_no_json_is_found(tmp_path):
    lines = [row("2")] * ROWS
    lines[119] = "{"
    (message,) = found(jsonl(tmp_path / "data.jsonl", lines))
    assert "line 120" in message
    lines[119] = "[1]"
    (message,) = found(jsonl(tmp_path / "data.jsonl", lines))
    assert "no JSON objects" in message and "line 120" in message


@pytest.mark.parametrize(
    ("bounds", "bad"),
    [("[:119]", False), ("[119:]", True), ("[120:]", False), ("[-30:]", False), ("[-31:-30]", True), ("[:-31]", False)],
)
def test_only_the_rows_that_slime_uses_are_judged(bounds, bad, tmp_path):
    rows = [row("2")] * ROWS
    rows[119] = row("3/4")
    message = found(f"{jsonl(tmp_path / 'data.jsonl', rows)}@{bounds}")
    assert ["in row 120," in one for one in message] == [True] * bad


def test_a_slice_without_rows_is_refused(tmp_path):
    (message,) = found(f"{jsonl(tmp_path / 'data.jsonl', [row('2')])}@[5:]")
    assert "has no rows" in message


@pytest.mark.parametrize("label", INTEGER_LABELS)
def test_labels_that_the_reward_reads_are_silent(label, tmp_path):
    assert label_integer(label)
    if not isinstance(label, Decimal):
        assert found(jsonl(tmp_path / "data.jsonl", [row(label)])) == []
    if isinstance(label, str | float):
        assert found(parquet(tmp_path / "data.parquet", [row(label)])) == []


@pytest.mark.parametrize("label", OTHER_LABELS)
def test_labels_that_the_reward_refuses_are_errors(label, tmp_path):
    with pytest.raises(ValueError, match="is not an integer"):
        label_integer(label)
    (message,) = found(jsonl(tmp_path / "data.jsonl", [row(label)]))
    assert message.startswith("error: ")


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text("0123456789.,-=$\\{}boxed% "),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=3,
)


@given(label=anything)
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_check_and_reward_judge_alike(label, tmp_path):
    try:
        expected = label_integer(label) is None
    except ValueError:
        expected = True
    assert bool(found(jsonl(tmp_path / "data.jsonl", [row(label)]))) == expected


def test_other_rewards_labels_are_not_judged(tmp_path):
    path = jsonl(tmp_path / "data.jsonl", [row("3/4")])
    assert found(path, "--rm-type", "math") == []
    assert found(path, "--custom-rm-path", "my.reward") == []


# Labels that are integers, and whether slime's own verifier compares them rightly; of the plain ones that is certain.
PLAIN = ["34", "034", "-4", "7.0", " 8 ", 7, 7.0]
SLIMES = {"1,000": True, "$12$": True, "\\boxed{7}": True, "x=5": True, "12 cm": True, "9007199254740993": False}
SLIMES |= {"-1,000": False, "\\boxed{-1,000}": False, "1\\,000": False, "\\mathrm{34}": False, "\u22124": False}


def judged_by_slime(label, tmp_path) -> list[str]:
    file_rules._slimes_verifier.cache_clear()
    messages = found(jsonl(tmp_path / "data.jsonl", [row(label)]), "--rm-type", "dapo")
    file_rules._slimes_verifier.cache_clear()
    assert all(OUR_REWARD in message for message in messages)
    return [message.partition(":")[0] for message in messages]


def test_labels_for_slimes_own_verifier_without_slime(tmp_path, monkeypatch):
    monkeypatch.setattr(file_rules, "find_spec", lambda name: None)
    assert [judged_by_slime(label, tmp_path) for label in PLAIN] == [[]] * len(PLAIN)
    assert [judged_by_slime(label, tmp_path) for label in SLIMES] == [["warning"]] * len(SLIMES)
    assert judged_by_slime("0.5", tmp_path) == ["error"]


@pytest.mark.slime
def test_labels_for_slimes_own_verifier_are_judged_by_it(slime_root, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(slime_root)
    assert [judged_by_slime(label, tmp_path) for label in PLAIN] == [[]] * len(PLAIN)
    for label, reads in SLIMES.items():
        assert judged_by_slime(label, tmp_path) == ["error"] * (not reads), label
    assert judged_by_slime("0.5", tmp_path) == ["error"], "slime would make it 0"
    for label in PLAIN:
        verdict = file_rules._slimes_verifier()(f"Answer: {int(float(label))}", label)
        assert verdict["acc"], "plain labels are taken without asking"


def test_keys_of_parquet_files(tmp_path):
    assert found(parquet(tmp_path / "right.parquet", [row("2")])) == []
    (message,) = found(parquet(tmp_path / "keys.parquet", [{"question": "1 + 1", "label": "2"}]))
    assert "--input-key prompt is not in every row" in message
    (tmp_path / "junk.parquet").write_bytes(b"junk")
    (message,) = found(tmp_path / "junk.parquet")
    assert "is no Parquet file" in message


def test_a_terminal_sees_a_progress_bar(tmp_path):
    path = jsonl(tmp_path / "data.jsonl", [row("2")] * 2000)
    program = (
        "import sys; from slime_fipo.check import file_rules; file_rules.PROGRESS_AFTER_SECONDS = 0.0;"
        " print(sum(1 for _ in file_rules._jsonl_rows(sys.argv[1])))"
    )
    for environment, shown in (({"FORCE_COLOR": "1"}, True), ({}, False)):
        run = subprocess.run(
            [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True, env=environment
        )
        assert run.stdout == "2000\n"
        assert ("Reading data.jsonl" in run.stderr) == shown
