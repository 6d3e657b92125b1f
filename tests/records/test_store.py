"""Records survive the disk, ranks merge to the same whole, and what is missing or damaged is named."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slime_fipo.algorithm import FipoConfig
from slime_fipo.errors import UserError
from slime_fipo.records import StepHeader, TokenRecord, read_records, step_file, write_step

HEADER = StepHeader(3, 0, 1, FipoConfig.preset("7b").as_dict(), "local", shift_from="rollout", alphabet="01")
PER_TOKEN = ("tokens", "loss_mask", "shift", "advantages", "future_kl", "influence", "fate", "mismatch")


def make_record(position: int, length: int, rng: np.random.Generator, mismatch: bool = True) -> TokenRecord:
    shift = rng.normal(size=length).astype(np.float32)
    if length:
        shift[rng.integers(length)] = rng.choice([np.nan, np.inf, 0.0])
    return TokenRecord(
        position=position,
        group=position // 2,
        reward=float(rng.normal()),
        prompt=rng.integers(1000, size=rng.integers(4)).astype(np.int32),
        tokens=rng.integers(1000, size=length).astype(np.int32),
        loss_mask=rng.random(length) < 0.8,
        shift=shift,
        advantages=rng.normal(size=length).astype(np.float32),
        future_kl=rng.normal(size=length).astype(np.float32),
        influence=rng.random(length).astype(np.float32),
        fate=rng.integers(128, size=length).astype(np.uint8),
        mismatch=rng.normal(size=length).astype(np.float32) if mismatch else None,
    )


def assert_same(found: TokenRecord, written: TokenRecord) -> None:
    assert (found.position, found.group, found.reward) == (written.position, written.group, written.reward)
    np.testing.assert_array_equal(found.prompt, written.prompt)
    for name in PER_TOKEN:
        wanted = getattr(written, name)
        if wanted is None:
            assert getattr(found, name) is None
        else:
            np.testing.assert_array_equal(getattr(found, name), wanted, err_msg=name)
    assert found.present.all()


@settings(deadline=None, max_examples=40)
@given(lengths=st.lists(st.integers(0, 40), max_size=6), cp=st.sampled_from([1, 2, 4]), seed=st.integers(0, 2**32 - 1))
def test_ranks_merge_to_what_was_written(tmp_path_factory, lengths, cp, seed):
    rng, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("records")
    written = [make_record(i, length, rng, mismatch=bool(seed % 2)) for i, length in enumerate(lengths)]
    for rank in range(cp):
        spans = []
        for length in lengths:  # the zigzag layout: chunks rank and 2·cp − 1 − rank
            edges = [round(length * k / (2 * cp)) for k in range(2 * cp + 1)]
            spans.append([(edges[k], edges[k + 1]) for k in (rank, 2 * cp - 1 - rank)])
        write_step(folder, replace(HEADER, cp_rank=rank, cp_size=cp), written, spans)
    found = read_records(folder)
    assert found.missing == []
    assert len(found.records) == len(written)
    for a, b in zip(found.records, written, strict=True):
        assert_same(a, b)


def test_what_is_missing_is_named(tmp_path):
    rng = np.random.default_rng(0)
    records = [make_record(0, 8, rng)]
    header = replace(HEADER, steps_per_rollout=4, cp_size=2, dp_size=2)
    write_step(tmp_path, header, records, [[(0, 2), (6, 8)]])
    write_step(tmp_path, replace(header, dp_rank=1, cp_rank=0), [], [])
    write_step(tmp_path, replace(header, dp_rank=1, cp_rank=1), [], [])
    found = read_records(tmp_path)
    assert found.missing == [
        "rollout 3, step 0: the file of data-parallel rank 0, context-parallel rank 1 is missing",
        "rollout 3, step 0, response 0: 4 of 8 tokens are missing",
        "rollout 3: step 3 of 4 is missing",
    ]
    assert found.records[0].present.tolist() == [True] * 2 + [False] * 4 + [True] * 2


def test_bad_files_are_one_line(tmp_path):
    with pytest.raises(UserError, match="holds no token records"):
        read_records(tmp_path)
    path = write_step(tmp_path, HEADER, [make_record(0, 8, np.random.default_rng(0))])
    assert path == step_file(tmp_path, HEADER)
    whole = path.read_bytes()
    for damage in (whole[: len(whole) // 2], b"", b"no record", whole.replace(b'"1"', b'"9"')):
        path.write_bytes(damage)
        with pytest.raises(UserError) as error:
            read_records(tmp_path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "blocked").write_text("a file where the folder should be")
    with pytest.raises(OSError):
        write_step(tmp_path / "blocked", HEADER, [])
    folder = step_file(tmp_path, HEADER)
    folder.mkdir(parents=True)  # a folder in the file's place
    with pytest.raises(OSError):
        write_step(tmp_path, HEADER, [make_record(0, 3, np.random.default_rng(0))])
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
