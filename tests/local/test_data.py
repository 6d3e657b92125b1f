"""Data files: what is accepted, and that each kind of bad line is named with file and line."""

import json

import pytest

from slime_fipo.errors import UserError
from slime_fipo.local.data import Alphabet, PromptSource, Record, read_jsonl
from slime_fipo.local.task import ALPHABET, DATA_DIRECTORY, LONG_SUMS, SUMS, write_data


@pytest.fixture
def read(tmp_path):
    def read(text: str | bytes):
        file = tmp_path / "prompts.jsonl"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_jsonl("--prompt-data", str(file), "prompt", "label", Alphabet("abc12"))

    return read


def test_reads_records_and_numbers_as_text(read):
    assert read('{"prompt": "ab", "label": 12, "more": []}\n\n{"label": "", "prompt": "c"}') == [
        Record("ab", "12"),
        Record("c", ""),
    ]


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ('{"prompt": "a", "label": "b"}\n{"prompt": "a", ', 2, "not valid JSON"),
        ('{"prompt": "a"}', 1, "no 'label'"),
        pytest.param('{"prompt": "a", "label": ' + "9" * 5000 + "}", 1, "a number too long", id="long number"),
        pytest.param(
            '{"prompt": "a", "label": ' + "[" * 100_000 + "}",
            1,
            "a number too long or brackets too deep",
            id="deep brackets",
        ),
        ("{}", 1, "no 'prompt'"),
        ("[1]", 1, "a list"),
        ('{"prompt": "a", "label": null}', 1, "'label' is a NoneType"),
        ('{"prompt": [], "label": "a"}', 1, "'prompt' is a list"),
        ('\n\n{"prompt": "", "label": "a"}', 3, "'prompt' is empty"),
        ('{"prompt": "ax", "label": "a"}', 1, "'prompt' holds 'x', which is not in --alphabet"),
        ('{"prompt": "a", "label": "\\u2028"}', 1, "'label' holds '\\u2028', which is not in --alphabet"),
    ],
)
def test_bad_line_is_named(read, text, line, says):
    with pytest.raises(UserError) as error:
        read(text)
    assert f"prompts.jsonl, line {line}: {says}" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("text", "says"), [("", "no records"), (" \n\n", "no records"), (b"\xff\xfe", "not UTF-8")])
def test_bad_file_is_named(read, text, says):
    with pytest.raises(UserError, match=says):
        read(text)


def test_missing_file_and_directory(tmp_path):
    for path, says in ((tmp_path / "absent", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(UserError, match=f"--prompt-data {path}: {says}"):
            read_jsonl("--prompt-data", str(path), "prompt", "label", Alphabet("a"))


@pytest.mark.parametrize("characters", ["", "aba"])
def test_bad_alphabet(characters):
    with pytest.raises(UserError, match="--alphabet"):
        Alphabet(characters)


@pytest.mark.parametrize("shuffle", [False, True])
def test_prompt_source_gives_every_record_once_per_epoch_from_any_position(shuffle):
    records = [Record(str(i), "") for i in range(7)]
    whole = PromptSource(records, shuffle, seed=3).take(21)
    for epoch in range(3):
        assert sorted(r.prompt for r in whole[7 * epoch : 7 * epoch + 7]) == [r.prompt for r in records]
    assert (whole[:7] == records) is not shuffle
    assert (whole[:7] == whole[7:14]) is not shuffle
    assert PromptSource(records, shuffle, seed=3, position=5).take(9) == whole[5:14]


def test_shipped_files_are_the_generator_s(tmp_path):
    write_data(tmp_path)
    for task in (SUMS, LONG_SUMS):
        for file in (tmp_path / task.name).iterdir():
            assert file.read_bytes() == (DATA_DIRECTORY / task.name / file.name).read_bytes()


@pytest.mark.parametrize("task", [SUMS, LONG_SUMS], ids=lambda task: task.name)
def test_shipped_task(task):
    folder = DATA_DIRECTORY / task.name
    rows = {f.stem: [json.loads(line) for line in f.read_text().splitlines()] for f in folder.iterdir()}
    prompts = {name: [row["prompt"] for row in part] for name, part in rows.items()}
    assert not set(prompts["heldout"]) & set(prompts["train"] + prompts["demonstrations"])
    assert len(set(prompts["heldout"])) == len(prompts["heldout"])
    for row in rows["heldout"] + rows["train"]:
        terms = [int(x) for x in row["prompt"].rstrip("=").split("+")]
        assert int(row["label"]) == sum(terms) % task.modulus
    reasons = [";" in row["response"] for row in rows["demonstrations"]]
    assert abs(sum(reasons) / len(reasons) - task.reason_probability) < 0.03
    chains = [(row["prompt"].count("+"), row["response"].count("=")) for row in rows["demonstrations"]]
    whole = sum(steps == terms for terms, steps in chains) / sum(reasons)
    carried = [(1 - task.give_up_probability) ** (terms - 1) for terms, steps in chains]
    assert abs(whole - sum(carried) / len(carried)) < 0.03
    assert len({prompt.count("+") for prompt in prompts["heldout"]}) > 1
    text = "".join(
        row["prompt"] + row.get("label", "") + row.get("response", "") for part in rows.values() for row in part
    )
    assert set(text) <= set(ALPHABET)
