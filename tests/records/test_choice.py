"""Recording's flags, and the choice of responses: whole groups, within the budget, a function of shared numbers."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slime_fipo.algorithm import FipoConfig, fipo_weights
from slime_fipo.errors import OneLineParser, UserError
from slime_fipo.records import Fate
from slime_fipo.records.arguments import RECORD_DESTS, RecordSettings, add_record_arguments, record_settings
from slime_fipo.records.choice import chosen_groups
from slime_fipo.records.packed import RECORDED_METRICS, token_records

HERE = Path("records")


def parse(*flags: str) -> RecordSettings | None:
    return record_settings(add_record_arguments(OneLineParser()).parse_args(flags))


def test_flags_and_their_defaults():
    assert parse() is None
    assert parse("--fipo-record", "a/b") == RecordSettings(Path("a/b"), 64, 10)
    given = ("--fipo-record", "/x", "--fipo-record-samples", "3", "--fipo-record-interval", "2")
    assert parse(*given) == RecordSettings(Path("/x"), 3, 2)
    assert set(vars(add_record_arguments(argparse.ArgumentParser()).parse_args([]))) == set(RECORD_DESTS)
    assert record_settings(argparse.Namespace()) is None


@pytest.mark.parametrize("name", RECORD_DESTS[1:])
@pytest.mark.parametrize("value", [0, -1, "8", 2.0, True, [1]])
def test_wrong_numbers_name_their_flag(name, value):
    flag = "--" + name.replace("_", "-")
    with pytest.raises(UserError, match=f"{flag} is"):
        record_settings(argparse.Namespace(**{"fipo_record": "x", name: value}))
    with pytest.raises(UserError, match=f"{flag} has no effect without --fipo-record"):
        record_settings(argparse.Namespace(**{name: 8}))


@pytest.mark.parametrize("value", ["", 3, True, ["x"], "a\0b"])
def test_wrong_folders(value):
    with pytest.raises(UserError, match="--fipo-record is"):
        record_settings(argparse.Namespace(fipo_record=value))


@pytest.mark.parametrize("inside", [".", "records", "a/b/c"])
@pytest.mark.parametrize("file", ["iter_0000100/common.pt", "hf/model-00001-of-00002.safetensors", "c/__0_0.distcp"])
def test_not_inside_a_checkpoint(tmp_path, monkeypatch, file, inside):
    checkpoint = (tmp_path / file).parent
    checkpoint.mkdir()
    (tmp_path / file).touch()
    monkeypatch.chdir(tmp_path)
    for folder in (checkpoint / inside, Path(checkpoint.name, inside)):
        with pytest.raises(UserError, match=f"is inside the checkpoint {checkpoint}"):
            parse("--fipo-record", str(folder))
    assert parse("--fipo-record", "records").folder == HERE  # next to it is fine


@settings(deadline=None, max_examples=300)
@given(
    samples=st.integers(1, 40),
    steps=st.integers(1, 6),
    step_size=st.integers(1, 40),
    group_size=st.integers(1, 16),
    rollout=st.integers(0, 20),
    interval=st.integers(1, 5),
)
def test_choice(samples, steps, step_size, group_size, rollout, interval):
    """slime's layout: steps are consecutive ranges of positions, groups are consecutive within the rollout."""
    chosen = {}
    for step in range(steps):
        positions = range(step * step_size, (step + 1) * step_size)
        groups = chosen_groups(
            RecordSettings(HERE, samples, interval),
            rollout_id=rollout,
            step_id=step,
            steps_per_rollout=steps,
            positions=positions,
            samples_per_prompt=group_size,
        )
        flat = [p for group in groups for p in group]
        assert flat == sorted(set(flat)) and set(flat) <= set(positions)
        assert all(len({p // group_size for p in group}) == 1 for group in groups)
        if flat:
            chosen[step] = groups
    count = sum(len(group) for groups in chosen.values() for group in groups)
    if rollout % interval:
        assert not chosen
        return
    assert 0 < count <= samples and set(chosen) <= {0, steps - 1}
    if samples > 1:
        assert set(chosen) == {0, steps - 1}
    half = samples // 2 if steps > 1 else samples
    for step, groups in chosen.items():
        whole = [
            g
            for g in range(steps * step_size)
            if step * step_size <= g * group_size <= (step + 1) * step_size - group_size
        ]
        if whole and half >= group_size:
            assert all(len(group) == group_size for group in groups)
            budget = half + (samples % 2 if step == 0 and steps > 1 else 0)
            assert len(groups) == min(len(whole), budget // group_size)


def test_all_of_a_small_rollout():
    """A budget that holds the step takes the whole step."""
    arguments = dict(rollout_id=0, step_id=0, steps_per_rollout=2, positions=range(32), samples_per_prompt=8)
    assert chosen_groups(RecordSettings(HERE, 64, 10), **arguments) == [range(8 * g, 8 * g + 8) for g in range(4)]
    assert chosen_groups(RecordSettings(HERE, 33, 10), **arguments) == [range(8), range(16, 24)]


def test_records_hold_what_the_loss_used():
    """Fate, F and f against ``fipo_weights`` itself, on a batch with every fate; spans are put in their places."""
    generator = torch.Generator().manual_seed(3)
    lengths = [5, 0, 7, 400]
    shift = 1.5 * torch.randn(sum(lengths), generator=generator)
    shift[[2, 30, 31]] = torch.tensor([torch.nan, torch.inf, 4.0])
    shift[5:12] = 4.0  # more than one ratio above c with a negative advantage: dropped
    advantages = torch.randn(shift.shape, generator=generator)
    advantages[5:12] = -1.0
    mask = (torch.rand(shift.shape, generator=generator) < 0.8).int()
    mask[5:12] = 1
    config = FipoConfig(decay_rate=4.0, safety_thresh=2.0)
    weights = fipo_weights(shift, torch.zeros_like(shift), advantages, mask, lengths, config, metrics=RECORDED_METRICS)
    metrics = {name: values.numpy() for name, values in weights.metrics.items()}
    packed = dict(loss_mask=mask.numpy(), shift=shift.numpy(), advantages=advantages.numpy(), metrics=metrics)
    tokens = [np.arange(n) for n in lengths]
    records = token_records([np.arange(2)] * 4, tokens, [0, 1, 2, 3], [0, 0, 1, 1], [1.0] * 4, **packed)

    fate = np.concatenate([record.fate for record in records])
    for flag in Fate:
        assert (fate & flag).any() and not (fate & flag).all(), flag
    assert np.array_equal((fate & Fate.MASKED) != 0, mask.numpy() == 0)
    assert np.array_equal((fate & Fate.NONFINITE) != 0, ~np.isfinite(shift.numpy()))
    influence = np.concatenate([record.influence for record in records])
    used = np.where(fate & Fate.DROPPED, 0, influence)
    np.testing.assert_array_equal(used, weights.weights.numpy())  # bitwise what multiplies the loss
    np.testing.assert_array_equal(np.concatenate([r.future_kl for r in records]), weights.future_kl.numpy())
    np.testing.assert_array_equal(np.concatenate([r.shift for r in records]), shift.numpy())

    spans = [[(1, 3)], [], [(0, 0), (6, 7)], [(0, 1), (390, 400)]]
    own = np.concatenate(
        [np.arange(a, b) + start for start, held in zip((0, 5, 5, 12), spans, strict=True) for a, b in held]
    )
    part = {name: values[own] for name, values in packed.items() if name != "metrics"}
    part["metrics"] = {name: values[own] for name, values in metrics.items()}
    for whole, held, record in zip(
        records,
        spans,
        token_records([np.arange(2)] * 4, tokens, [0] * 4, [0] * 4, [0.0] * 4, spans=spans, **part),
        strict=True,
    ):
        assert record.present.sum() == sum(b - a for a, b in held)
        np.testing.assert_array_equal(record.shift[record.present], whole.shift[record.present])
        np.testing.assert_array_equal(record.fate[record.present], whole.fate[record.present])
        assert not record.influence[~record.present].any()
