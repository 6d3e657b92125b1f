"""Dumps written by three slime versions' own functions come back as the samples that they were made from."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from slime_fipo import FipoConfig, fipo_weights
from slime_fipo.errors import UserError
from slime_fipo.records.slime_dump import SlimeDump

from .conftest import python

CONFIG = FipoConfig.preset("7b")
LAYOUTS = ("cp1", "cp2_dp2", "tp2_cp2")


@pytest.fixture(scope="module")
def dumps(slime, tmp_path_factory):
    out = tmp_path_factory.mktemp("dumps")
    run = python(["-m", "tests.slime.dump_rig", out], slime, timeout=540)
    assert run.returncode == 0, run.stderr[-4000:]
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
def test_samples_are_whole_again(dumps, layout):
    expected = torch.load(dumps / "expected.pt", weights_only=True)
    dump = SlimeDump(dumps / layout, CONFIG, use_rollout_logprobs=True)
    assert dump.rollout_ids == [7]
    found = dump.read(7)
    assert found.missing == dump.missing() == []
    count = len(expected["tokens"])
    assert sorted(record.position for record in found.records) == list(range(count))
    for record in found.records:
        p = record.position
        assert (record.header.step_id, record.group, record.reward) == (p * 2 // count, p // 5, p % 2)
        assert record.header.steps_per_rollout == 2
        np.testing.assert_array_equal(np.concatenate([record.prompt, record.tokens]), expected["tokens"][p])
        np.testing.assert_array_equal(record.loss_mask, expected["loss_masks"][p] != 0)
        np.testing.assert_array_equal(record.advantages, expected["advantages"][p])
        shift = expected["log_probs"][p] - expected["rollout_log_probs"][p]
        np.testing.assert_array_equal(record.shift, shift)
        weights = fipo_weights(
            expected["log_probs"][p],
            expected["rollout_log_probs"][p],
            expected["advantages"][p],
            expected["loss_masks"][p],
            [len(shift)],
            CONFIG,
        )
        np.testing.assert_allclose(record.future_kl, weights.future_kl, atol=1e-6)
        np.testing.assert_allclose(record.influence, weights.metrics["influence_weight"], atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_mismatch_where_the_trainer_recomputes(dumps, layout):
    expected = torch.load(dumps / "expected.pt", weights_only=True)
    for record in SlimeDump(dumps / layout, CONFIG, use_rollout_logprobs=False).read(7).records:
        p = record.position
        assert record.future_kl is record.influence is None
        np.testing.assert_array_equal(record.mismatch, expected["log_probs"][p] - expected["rollout_log_probs"][p])


def test_the_trend(dumps):
    rows = list(SlimeDump(dumps / "cp1", CONFIG).trend())
    assert rows[0]["rollout/step"] == rows[1]["eval/step"] == 7
    assert rows[0]["rollout/raw_reward"] == rows[1]["eval/dump"] == 0.5
    assert rows[0]["rollout/response_len/mean"] == pytest.approx(26.7)


def test_a_missing_rank_is_named(dumps, version, tmp_path):
    if version == "main":
        pytest.skip("slime main merges the ranks itself")
    shutil.copytree(dumps / "cp2_dp2", tmp_path / "dump")
    files = sorted((tmp_path / "dump" / "train_data").iterdir())
    assert len(files) == 4
    files[2].unlink()
    found = SlimeDump(tmp_path / "dump", CONFIG, False).read(7)
    assert len(found.records) == 10
    assert len(found.missing) == 1
    assert "tokens of 4 responses (3, 5, 7, 9) are missing" in found.missing[0]
    expected = torch.load(dumps / "expected.pt", weights_only=True)
    for record in found.records:
        p = record.position
        # All of response 1 lies in the sequence's last chunk, which the first rank holds.
        assert record.present.all() == (p % 2 == 0 or p == 1)
        mismatch = (expected["log_probs"][p] - expected["rollout_log_probs"][p]).numpy()
        np.testing.assert_array_equal(record.mismatch[record.present], mismatch[record.present])
    files[3].unlink()  # a whole data-parallel rank
    found = SlimeDump(tmp_path / "dump", CONFIG, False).read(7)
    assert len(found.records) == 5
    assert len(found.missing) == 1
    assert "5 of 10 responses (1, 3, 5, 7, 9)" in found.missing[0]
    files[0].unlink()  # no data-parallel rank is whole
    with pytest.raises(UserError, match="do not make up whole responses"):
        SlimeDump(tmp_path / "dump", CONFIG, False).read(7)
