"""Folders in, one line out where they are of no kind; which responses are chosen, and the response on the terminal."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from slime_fipo.cli import app
from slime_fipo.errors import UserError
from slime_fipo.records import Fate, StepHeader, read_records, write_step
from slime_fipo.records.text import Decoders
from slime_fipo.report.command import write_report
from slime_fipo.report.inputs import DumpOptions, read_inputs
from slime_fipo.report.selection import extremeness, select
from slime_fipo.report.statistics import noise, response_row, trend
from slime_fipo.report.terminal import print_response

from .rig import ALPHABET, CONFIG, make_records, write_rollout

DUMP = Path(__file__).parents[1] / "records" / "dump"


def command(*argv) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["report", *map(str, argv)])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("inputs") / "records"
    for rollout in (0, 10):
        write_rollout(path, rollout, seed=rollout)
    return path


def test_the_command_writes_the_page_and_prints_its_path(folder, tmp_path):
    code, output, _ = command(folder, "--output", tmp_path / "page.html", "--samples", 8)
    assert code == 0
    sentence, path = output.splitlines()
    assert sentence.startswith("8 of 32 recorded responses") and "--samples" in sentence
    assert path == str(tmp_path / "page.html") and (tmp_path / "page.html").stat().st_size > 4e6
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "is none of these: a run directory of slime-fipo local"),
        (lambda path: path.rmdir(), "does not exist"),
        (lambda path: (path.rmdir(), path.write_text("")), "is not a folder"),
        (
            lambda path: (path / "metrics.jsonl").write_text("{}\nnot json\n"),
            "metrics.jsonl, line 2 is not a JSON object",
        ),
        (lambda path: truncated(path), "cannot be read"),
        (lambda path: (path / "seed-1/a").mkdir(parents=True), "is none of these"),
    ],
)
def test_a_bad_path_is_one_line(tmp_path, make, says):
    path = tmp_path / "input"
    path.mkdir()
    make(path)
    code, output, error = command(path)
    assert (code, output) == (2, "") and len(error.splitlines()) == 1
    assert says in error and str(path) in error


def truncated(path) -> None:
    write_rollout(path)
    file = next(path.glob("*/*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--rollout", "3"], "--rollout 3 is not recorded; recorded are 0, 10"),
        (["--group", "99"], "--group 99 is not recorded"),
        (["--samples", "-1"], "--samples is -1"),
        (["--tokens", "7:0"], "rollout 7 is not recorded; recorded are 0, 10"),
        (["--tokens", "99"], "no response at position 99"),
        (["--tokens", "first"], "give POSITION or ROLLOUT:POSITION"),
        (["--output", "/proc/none/page.html"], "/proc/none/page.html cannot be written"),
        (["--tokenizer", "/nowhere"], "--tokenizer /nowhere is not a folder"),
        (["--tokens", "10:25", "--tokenizer", "/nowhere"], "--tokenizer /nowhere is not a folder"),
        (["--tokens", "10:25", "--output", "page.html"], "--output has no effect with --tokens"),
        (["--tokens", "10:25", "--samples", "64"], "--samples has no effect with --tokens"),
        (["--tokens", "25", "--rollout", "10"], "--rollout has no effect with --tokens"),
        (["--tokens", "25", "--group", "6"], "--group has no effect with --tokens"),
    ],
)
def test_a_bad_flag_is_one_line(folder, flags, says):
    code, _, error = command(folder, *flags)
    assert code == 2 and says in error and len(error.splitlines()) == 1


def test_several_paths_of_several_kinds(folder, tmp_path):
    run = tmp_path / "records"  # the same name as the other folder
    write_rollout(run / "records")
    (run / "metrics.jsonl").write_text(json.dumps({"rollout/step": 0, "rollout/raw_reward": 0.25}) + "\n")
    comparison = tmp_path / "compare"
    for seed in (1, 2):
        for arm in ("base", "dapo", "fipo-7b"):
            (comparison / f"seed-{seed}" / arm).mkdir(parents=True)
            (comparison / f"seed-{seed}" / arm / "metrics.jsonl").write_text('{"eval/step": 0, "eval/heldout": 0.5}\n')
    runs = read_inputs([folder, run, comparison])
    names = [run.name for run in runs]
    assert names[0] == "records" and names[1] == f"records ({run})"
    assert names[2:] == ["dapo, seed-1", "fipo-7b, seed-1", "dapo, seed-2", "fipo-7b, seed-2"]
    assert runs[2].missing == [f"{comparison}: compare.json is missing, so the comparison has not finished"]
    panels = {panel["title"]: panel["series"] for panel in trend(runs[1])}
    assert panels["Reward or accuracy"] == [{"label": "reward of rollouts", "x": [0], "y": [0.25]}]
    assert panels["Mean |f − 1|"][0]["x"] == [0]  # not logged, so from the records
    write_report([folder, run, comparison], tmp_path / "page.html")


def test_whole_groups_extremes_first_every_step_represented(folder):
    runs = read_inputs([folder])
    chosen, _ = select(runs, 16)
    places = {(r.header.rollout_id, r.header.step_id) for _, r in chosen}
    assert len(chosen) == 16 and places == {(0, 0), (0, 3), (10, 0), (10, 3)}
    for rollout, step in places:
        there = [r for r in runs[0].records if (r.header.rollout_id, r.header.step_id) == (rollout, step)]
        groups = {r.group for _, r in chosen if (r.header.rollout_id, r.header.step_id) == (rollout, step)}
        most = max(there, key=extremeness)
        assert groups == {most.group}
    only, sentence = select(runs, 64, rollouts=[10], groups=[1])
    assert {(r.header.rollout_id, r.group) for _, r in only} == {(10, 1)} and "rollout 10 and group 1" in sentence
    assert len(select(runs, 0)[0]) == 0 and len(select(runs, 5)[0]) == 5
    with pytest.raises(UserError):
        select(runs, 64, rollouts=[10], groups=[99])


def test_sums_leave_out_what_is_masked_missing_or_not_finite():
    [record, *_] = make_records(range(1), rare=0)
    trained = record.loss_mask.copy()
    trained[:3] = True
    shift, influence = record.shift.copy(), record.influence.copy()
    shift[0] = np.nan
    influence[:3] = (1.1, 1.2, 1.3)
    present = np.zeros(len(shift), bool)
    present[:3] = True
    fate = np.zeros(len(shift), np.uint8)
    fate[[0, 1]], fate[10] = (Fate.NONFINITE, Fate.CLIPPED_HIGH), Fate.CLIPPED_HIGH
    row = response_row(replace(record, loss_mask=trained, shift=shift, influence=influence, present=present, fate=fate))
    assert row["f"] == pytest.approx(1.2) and row["f_max"] == pytest.approx(1.3) and row["trained"] == 3
    assert row["clipped"] == pytest.approx(1 / 3) and row["nonfinite"] == 1
    assert row["absent"] == len(shift) - 3


def test_noise_of_a_known_size():
    """Independent noise σ becomes σ/√(1 − γ²) in F."""
    header = StepHeader(0, 0, 1, CONFIG.as_dict(), "slime", shift_from="rollout")
    records = make_records(range(8), lengths=(3000, 3000), noise=0.02, drift=0.0, rare=0)
    found = noise({0: [replace(r, header=header) for r in records]}, last=0)
    sigma = 0.02 / np.sqrt(1 - 2 ** (-2 / 32))
    assert found["noise"] == pytest.approx(sigma * np.sqrt(2 / np.pi), rel=0.1)
    assert found["ratio"] == pytest.approx(1, rel=0.05) and found["verdict"] == "noise"


def test_a_response_on_the_terminal(folder):
    code, output, _ = command(folder, "--tokens", "10:25")
    assert code == 0
    record = next(r for r in read_records(folder).records if r.header.rollout_id == 10 and r.position == 25)
    lines = output.splitlines()
    assert lines[0] == "rollout 10, step 3 of 4, position 25, group 6"
    assert f"clipped {response_row(record)['clipped']:.1%}" in output
    assert f"mean f {record.influence[record.loss_mask].mean():.4g}" in lines[1]
    plain = "".join(ALPHABET[t - 1] for t in record.tokens).replace("\n", "")
    body = "".join(lines[2:-1]).split("colour:")[0]
    for mark in "^_!x?↵":  # marks stand behind tokens; of the alphabet only x is one of them
        body = body.replace(mark, "")
    assert body.endswith(plain.replace("x", ""))


def test_the_terminals_colours_follow_f(folder):
    record = next(r for r in read_records(folder).records if r.header.step_id == 3)
    record = replace(
        record, influence=np.ones(len(record.tokens), np.float32), fate=np.zeros(len(record.tokens), np.uint8)
    )
    record.loss_mask[:] = True
    record.influence[3], record.influence[5] = 1.2, 0.8
    record.fate[3] = Fate.CLIPPED_HIGH
    buffer = io.StringIO()
    print_response(Console(file=buffer, force_terminal=True, color_system="truecolor", width=300), record, Decoders())
    output = buffer.getvalue()
    assert output.count("48;2;179;88;6m") == 2 and output.count("48;2;33;102;172m") == 2  # the token, and the scale
    assert "clipped at the upper bound" in output and "lower bound" not in output


def test_a_dump_of_slimes(tmp_path):
    code, output, error = command(
        DUMP, "--use-rollout-logprobs", "--fipo-preset", "7b", "--output", tmp_path / "page.html"
    )
    assert code == 0, error
    assert output.startswith("64 of 64 recorded responses")
    options = DumpOptions(CONFIG, True)
    [run] = read_inputs([DUMP], options)
    assert {record.header.step_id for record in run.records} == {0, 1, 2, 3}
    assert all(record.influence is not None for record in run.records)
    [unknown] = read_inputs([DUMP])
    assert all(record.influence is None for record in unknown.records)
    assert any("--use-rollout-logprobs" in note for note in unknown.notes)
    [found] = {noise({0: [r for r in unknown.records if r.header.step_id == 0]}, last=3)["verdict"]}
    assert found == "unknown"  # the mismatch by itself, and nothing to compare it with
    code, output, _ = command(DUMP, "--tokens", "0:3", "--use-rollout-logprobs")
    assert code == 0 and "rollout 0, step" in output


def test_tokens_of_any_rollout_of_a_dump(tmp_path):
    """A page reads a dump's first and newest rollout by default; --tokens reads the one that it names."""
    for part in ("train_data", "rollout_data"):
        (tmp_path / part).mkdir()
        for rollout in range(3):
            shutil.copy(DUMP / part / "0.pt", tmp_path / part / f"{rollout}.pt")
    code, output, error = command(tmp_path, "--tokens", "1:3")
    assert code == 0, error
    assert output.startswith("rollout 1, step")


@pytest.fixture
def dump(tmp_path):
    """Three rollouts as slime dumps them, and of a fourth only what was sampled."""
    folder = tmp_path / "dump"
    for part, rollouts in (("train_data", range(3)), ("rollout_data", range(4))):
        (folder / part).mkdir(parents=True)
        for rollout in rollouts:
            shutil.copy(DUMP / part / "0.pt", folder / part / f"{rollout}.pt")
    shutil.copy(DUMP / "rollout_data/eval_0.pt", folder / "rollout_data/eval_0.pt")
    return folder


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--rollout", "7"], "--rollout 7 is not recorded; recorded are 0, 1, 2"),
        (["--rollout", "1", "--rollout", "7"], "--rollout 7 is not recorded; recorded are 0, 1, 2"),
        (["--rollout", "3"], "--rollout 3 is not recorded; recorded are 0, 1, 2"),
        (["--tokens", "7:0"], "--tokens 7:0: rollout 7 is not recorded; recorded are 0, 1, 2"),
    ],
)
def test_a_rollout_that_a_dump_lacks_is_named_with_those_it_has(dump, flags, says):
    code, _, error = command(dump, *flags)
    assert code == 2 and says in error and len(error.splitlines()) == 1
    assert not (dump / "report.html").exists()


def test_the_first_and_the_newest_rollout_that_was_trained_on(dump):
    [run] = read_inputs([dump])
    assert {record.header.rollout_id for record in run.records} == {0, 2} and run.unread == [1]
    [run] = read_inputs([dump], DumpOptions(rollouts=(1,)))
    assert {record.header.rollout_id for record in run.records} == {1} and run.unread == [0, 2]


@pytest.mark.parametrize("file", ["train_data/0.pt", "train_data/2.pt", "rollout_data/3.pt", "rollout_data/eval_0.pt"])
def test_a_truncated_file_of_a_dump_is_one_line(dump, file):
    whole = (dump / file).read_bytes()
    (dump / file).write_bytes(whole[: len(whole) // 2])
    code, output, error = command(dump)
    assert (code, output) == (2, "") and len(error.splitlines()) == 1
    assert str(dump / file) in error and "it is damaged or not a file of slime's dump" in error


@pytest.mark.parametrize("flags", [["--fipo-preset", "7b"], ["--use-rollout-logprobs"], ["--no-use-rollout-logprobs"]])
@pytest.mark.parametrize("more", [[], ["--tokens", "10:25"]])
def test_what_only_a_dump_needs_to_be_told_is_refused_elsewhere(folder, dump, tmp_path, flags, more):
    code, _, error = command(folder, *flags, *more)
    assert code == 2 and len(error.splitlines()) == 1
    assert f"{flags[0].replace('--no-', '--')} has no effect" in error
    if not more:
        assert command(folder, dump, *flags, "--output", tmp_path / "page.html")[0] == 0


def test_a_tokenizer_without_records_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"rollout/step": 0, "rollout/raw_reward": 0.25}\n')
    code, _, error = command(tmp_path, "--tokenizer", tmp_path)
    assert code == 2 and f"--tokenizer {tmp_path} has no effect" in error


def test_a_dump_without_the_log_probs_that_the_flag_speaks_of_says_so(dump):
    contents = torch.load(dump / "train_data/1.pt", weights_only=True)
    del contents["samples"][3]["rollout_log_probs"]
    torch.save(contents, dump / "train_data/1.pt")
    [run] = read_inputs([dump], DumpOptions(use_rollout_logprobs=True, rollouts=(1,)))
    [sentence] = [sentence for sentence in run.missing if "cannot be rebuilt" in sentence]
    assert sentence.startswith("rollout 1: train_data holds no rollout_log_probs of some responses")


def test_a_page_of_no_responses_does_not_say_how_they_were_chosen(folder):
    _, sentence = select(read_inputs([folder]), 0)
    assert sentence.startswith("0 of 32 recorded responses") and "largest" not in sentence


def test_an_unknown_preset_is_one_line():
    code, _, error = command(DUMP, "--fipo-preset", "9b")
    assert code == 2 and "--fipo-preset '9b' is unknown" in error and len(error.splitlines()) == 1


def test_numbers_that_are_not_numbers_still_make_a_page(tmp_path):
    """NaN and infinities wherever a loss can leave them, empty and fully masked responses, ids of no token."""
    records = make_records(range(3), lengths=(5, 9))
    for record, value in zip(records, [np.nan, np.inf, -np.inf] * 4, strict=True):
        for name in ("shift", "advantages", "future_kl", "influence", "mismatch"):
            getattr(record, name)[:3] = value
        record.reward = value
        record.tokens[:2] = (-5, 2**31 - 1)
    for name in ("shift", "advantages", "future_kl", "influence", "mismatch"):
        getattr(records[4], name)[:] = np.nan
    records[5].loss_mask[:] = False
    records[6] = replace(
        records[6],
        present=None,
        **{n: getattr(records[6], n)[:0] for n in ("tokens", "loss_mask", "fate")},
        **{n: getattr(records[6], n)[:0] for n in ("shift", "advantages", "future_kl", "influence", "mismatch")},
    )
    for step in (0, 3):
        write_step(tmp_path, StepHeader(0, step, 4, CONFIG.as_dict(), "local", alphabet=ALPHABET), records)
    rows = [
        {"rollout/step": 0, "rollout/raw_reward": float("nan"), "train/entropy_loss": "high"},
        {"rollout/step": "0", "rollout/raw_reward": 1},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert command(tmp_path)[0] == 0
    (tmp_path / "metrics.jsonl").unlink()
    assert command(tmp_path)[0] == 0
    assert command(tmp_path, "--tokens", "0:6")[0] == 0


def test_settings_of_no_version_are_one_line(tmp_path):
    write_step(tmp_path, StepHeader(0, 0, 1, {"decay_rate": -1}, "local"), make_records(range(1)))
    code, _, error = command(tmp_path)
    assert code == 2 and "decay_rate is -1" in error and len(error.splitlines()) == 1


def test_the_same_records_give_the_same_page_byte_for_byte(folder, tmp_path, monkeypatch):
    pages = []
    for now in (1e9, 2e9):
        monkeypatch.setattr("time.time", lambda now=now: now)
        write_report([folder], tmp_path / "page.html", samples=4)
        pages.append((tmp_path / "page.html").read_bytes())
    assert pages[0] == pages[1]
