"""A real dump of slime main gives back what slime logged; damaged, foreign and hostile files are one line."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from slime_fipo import FipoConfig
from slime_fipo.errors import UserError
from slime_fipo.records.slime_dump import SlimeDump, is_dump, zigzag_spans

DUMP = Path(__file__).parent / "dump"  # slime main 624b824a's train.py on the demo's task, --use-rollout-logprobs
CONFIG = FipoConfig.preset("7b")


def test_the_rebuilt_weights_are_those_that_slime_logged():
    found = SlimeDump(DUMP, CONFIG, use_rollout_logprobs=True).read(0)
    assert found.missing == []
    logged = json.loads((DUMP / "logged_metrics.json").read_text())["steps"][:4]
    for step, metrics in enumerate(logged):
        records = [record for record in found.records if record.header.step_id == step]
        assert len(records) == 16

        def mean(values, records=records):
            of_responses = [(values(r) * r.loss_mask).sum() / r.loss_mask.sum() for r in records]
            return float(np.mean(of_responses))

        for name, values in {
            "future_kl": lambda r: r.future_kl,
            "influence_weight": lambda r: r.influence,
            "influence_deviation": lambda r: abs(r.influence - 1),
        }.items():
            assert mean(values) == pytest.approx(metrics[f"train/fipo/{name}"], abs=1e-6)
    assert {record.group for record in found.records} == set(range(8))
    assert np.mean([record.reward for record in found.records]) == 0.375


def test_what_cannot_be_known_is_not_there():
    for declared in (False, None):
        for record in SlimeDump(DUMP, CONFIG, use_rollout_logprobs=declared).read(0).records:
            assert record.future_kl is record.influence is None
            known = declared is False or record.header.step_id == 0
            assert (record.mismatch is not None) == known
    first = SlimeDump(DUMP, CONFIG).read(0).records[:16]
    assert np.mean([abs(record.mismatch).mean() for record in first]) == pytest.approx(0.001, abs=0.001)


@pytest.fixture
def dump(tmp_path) -> Path:
    shutil.copytree(DUMP, tmp_path / "dump")
    return tmp_path / "dump"


def line(folder: Path) -> str:
    """What reading the folder is refused with."""
    with pytest.raises(UserError) as error:
        SlimeDump(folder, CONFIG, True).read(0)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_damaged_and_foreign_files(dump):
    train, rollout = dump / "train_data/0.pt", dump / "rollout_data/0.pt"
    whole = train.read_bytes()
    for content in (b"", b"not a zip", whole[: len(whole) // 2], whole[:100]):
        train.write_bytes(content)
        assert str(train) in line(dump)
    for contents in (
        [1],
        {"samples": 3},
        {"format_version": 2},
        {"format_version": 2, "dp_shards": [{}], "samples": []},
    ):
        torch.save(contents, train)
        assert str(train) in line(dump)
    contents = {"format_version": 3, "rollout_id": 0, "samples": [], "dp_shards": []}
    torch.save(contents, train)
    assert "format_version 3" in line(dump)
    train.write_bytes(whole)
    torch.save({"samples": [3]}, rollout)
    assert str(rollout) in line(dump)


def test_a_folder_that_is_no_dump(tmp_path):
    assert not is_dump(tmp_path)
    assert is_dump(DUMP)
    assert "--dump-details" in line(tmp_path)


class Attack:
    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch '{self.canary}'",)


@pytest.mark.parametrize("part", ["train_data/0.pt", "rollout_data/0.pt"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_hostile_pickle_runs_nothing(dump, tmp_path, part, zipped):
    canary = tmp_path / "canary"
    contents = {"format_version": 2, "samples": [Attack(canary)], "dp_shards": []}
    if zipped:
        torch.save(contents, dump / part)
    else:
        (dump / part).write_bytes(pickle.dumps(contents))
    assert part in line(dump)
    assert not canary.exists()
    pickle.loads(pickle.dumps(Attack(canary)))  # the attack itself works
    assert canary.exists()


def test_arrays_in_a_dump_are_data(dump):
    """Routed experts and multimodal inputs are numpy arrays, which torch's unpickler does not know by itself."""
    contents = torch.load(dump / "rollout_data/0.pt", weights_only=True)
    for i, sample in enumerate(contents["samples"]):
        sample["rollout_routed_experts"] = np.arange(6, dtype=(np.int32, np.float64, np.uint8)[i % 3]).reshape(2, 3)
        sample["metadata"] = {"score": np.float32(0.5)}
    torch.save(contents, dump / "rollout_data/0.pt")
    assert len(SlimeDump(dump, CONFIG, True).read(0).records) == 64


def test_missing_parts_are_named(dump):
    shutil.copy(dump / "train_data/0.pt", dump / "train_data/3.pt")
    assert SlimeDump(dump, CONFIG).missing() == [
        "rollout 3: rollout_data/3.pt is missing",
        "rollout 1 is not in the dump",
        "rollout 2 is not in the dump",
    ]
    contents = torch.load(dump / "train_data/0.pt", weights_only=True)
    contents["samples"] = contents["samples"][:-2]
    torch.save(contents, dump / "train_data/0.pt")
    [sentence] = SlimeDump(dump, CONFIG, True).read(0).missing
    assert "2 of 64 responses (62, 63)" in sentence


@pytest.mark.parametrize("cp_size", [1, 2, 3, 4])
@pytest.mark.parametrize(("total", "response"), [(1, 1), (9, 0), (9, 9), (40, 33), (126, 6), (7, 3)])
def test_spans_are_a_partition_of_the_response(total, response, cp_size):
    spans = sorted(span for rank in range(cp_size) for span in zigzag_spans(total, response, total, cp_size, rank))
    covered = [token for start, end in spans for token in range(start, end)]
    assert covered == list(range(response))
