"""Token records of slime's training: what ranks write merges to the same whole, and training does not notice."""

import numpy as np
import pytest
import torch

from slime_fipo.records import Fate, read_records

from .conftest import VERSIONS, python

LAYOUTS = {
    "main": ("cp2", "cp4", "tp2", "dp2", "dp2_cp2"),
    "v0.3.1": ("cp2", "dp2"),
    "v0.3.0": ("cp2", "dp2"),
}
assert LAYOUTS.keys() == VERSIONS.keys()
RUNS = ("static", "dynamic", "balanced", "recompute", "rollout_logprobs", "few")
EXACT = ("prompt", "tokens", "loss_mask", "advantages", "fate", "present")
CLOSE = ("shift", "future_kl", "influence", "mismatch")


@pytest.fixture(scope="module")
def out(slime, version, tmp_path_factory):
    out = tmp_path_factory.mktemp(f"records-{version}")
    run = python(["-m", "tests.slime.record_rig", out, "cp1", *LAYOUTS[version]], slime, timeout=540)
    assert run.returncode == 0, run.stderr[-4000:]
    return out


def results(out, world: str) -> list[dict]:
    return torch.load(out / f"{world}.pt", weights_only=True)


def read(out, world: str, run: str):
    found = read_records(out / world / run)
    assert found.missing == [], world
    return found.records


def test_what_is_recorded(out):
    """24 responses in 3 steps: 8 in the first, 8 in the last, all within 64; and with 8 allowed, a group of each."""
    for run in RUNS:
        records = read(out, "cp1", run)
        assert [(r.header.step_id, r.position) for r in records] == (
            [(0, i) for i in range(4)] + [(2, i) for i in range(16, 20)]
            if run == "few"
            else [(0, i) for i in range(8)] + [(2, i) for i in range(16, 24)]
        )
        for record in records:
            header = record.header
            assert (header.rollout_id, header.steps_per_rollout, header.samples_per_rollout) == (20, 3, 24)
            assert (header.source, header.tokenizer, header.samples_per_prompt) == ("slime", "/models/policy", 4)
            assert header.shift_from == ("rollout" if run == "rollout_logprobs" else "train")
            assert header.config["safety_thresh"] == 3.0
            assert (record.group, record.reward) == (record.position // 4, float(record.position))
    fates = np.bitwise_or.reduce(np.concatenate([r.fate for r in records]))
    assert fates & (Fate.CLIPPED_HIGH | Fate.CAPPED | Fate.EXCLUDED | Fate.MASKED)


def test_mismatch_is_there_where_both_log_probs_are(out):
    assert all(r.mismatch is not None and np.abs(r.mismatch).max(initial=0) < 0.2 for r in read(out, "cp1", "static"))
    for record in read(out, "cp1", "rollout_logprobs"):  # the trainer's own are not computed, but for the first step's
        if record.header.step_id == 0:
            np.testing.assert_array_equal(record.mismatch, record.shift)
        else:
            assert record.mismatch is None


def test_ranks_merge_to_the_same_whole(out, version):
    for run in RUNS:
        whole = read(out, "cp1", run)
        for world in LAYOUTS[version]:
            found = read(out, world, run)
            assert [(r.header.step_id, r.position) for r in found] == [(r.header.step_id, r.position) for r in whole]
            for a, b in zip(found, whole, strict=True):
                where = f"{world}, {run}, response {a.position}"
                assert (a.group, a.reward) == (b.group, b.reward), where
                for name in EXACT:
                    np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=f"{where}: {name}")
                for name in CLOSE:
                    if getattr(b, name) is not None:
                        np.testing.assert_allclose(
                            getattr(a, name), getattr(b, name), rtol=2e-6, atol=2e-6, err_msg=f"{where}: {name}"
                        )


def test_recorded_weights_are_bitwise_what_multiplied_the_loss(out, version):
    for world in ("cp1", *LAYOUTS[version]):
        compared = 0
        for run in RUNS:
            used: dict[int, list] = {}
            for rank in results(out, world):
                for position, weights in rank[run]["multiplied"].items():
                    used.setdefault(position, []).append(weights.numpy())
            for record in read(out, world, run):
                recorded = np.where(record.fate & Fate.DROPPED, np.float32(0), record.influence)
                # What a context-parallel rank multiplied are two spans of it, end to end; tensor ranks repeat it.
                parts = used[record.position]
                if "cp" in world and world != "cp1":
                    assert sum(map(len, parts)) == len(recorded)
                    assert sorted(np.concatenate(parts)) == sorted(recorded), (world, run, record.position)
                else:
                    np.testing.assert_array_equal(parts[0], recorded)
                compared += len(recorded)
        assert compared > 1000


def test_training_is_bitwise_the_same(out, version):
    for world in ("cp1", *LAYOUTS[version]):
        for rank in results(out, world):
            for run in RUNS:
                for what in ("same_gradients", "same_metrics", "same_weights"):
                    assert rank[run][what], (world, run, what)


def test_what_records_nothing_asks_torch_for_nothing(out):
    counts = results(out, "cp1")[0]["operations"]
    assert counts["not_this_rollout"] == counts["off"]
    assert counts["recorded"] > counts["off"]


def test_a_folder_that_cannot_be_written_is_one_warning(out):
    failure = results(out, "cp1")[0]["failures"]["blocked"]
    assert failure["same"]
    [message] = failure["messages"]
    assert "--fipo-record: rollout 20, step 0 is not recorded" in message and message.endswith("; training goes on")


def test_groups_that_cannot_be_told_are_one_warning(out):
    failure = results(out, "cp1")[0]["failures"]["parts"]
    [message] = failure["messages"]
    assert "24 samples of 4 prompts with 4 responses each" in message
    assert not failure["files"]


def test_without_the_hooks_the_first_micro_batch_names_them(out):
    step, rollout = results(out, "cp1")[0]["failures"]["hooks"]
    assert "custom_megatron_before_train_step_hook_path: slime_fipo.plugin.loss.before_train_step_hook" in step
    assert "rollout_data_postprocess_path: slime_fipo.plugin.recorder.rollout_data_hook" in rollout


def test_heatmaps_are_in_slimes_wandb_run(out, version):
    """Of the first and the last step, from the rank that slime's tracker runs on, also where it holds parts."""
    for world in ("cp1", "dp2_cp2") if version == "main" else ("cp1",):
        pages = sorted(
            (out / f"wandb-{world}" / "wandb").glob("offline-run-*/files/media/html/train/fipo/heatmap_*.html")
        )
        texts = [page.read_text() for page in pages]
        assert len(texts) == 2, world
        assert {"step 0", "step 2"} == {step for step in ("step 0", "step 2") for text in texts if step in text}
        for text in texts:
            assert "rollout 20" in text and 'title="token ' in text and ", F " in text
            assert ("other context-parallel ranks" in text) == (world != "cp1")
