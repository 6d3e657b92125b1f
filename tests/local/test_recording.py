"""The engine's token records: what its loss used, bit for bit, of the steps asked for; training stays the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from slime_fipo.errors import UserError
from slime_fipo.local import engine, objective
from slime_fipo.local.arguments import parse_arguments
from slime_fipo.local.checkpoint import read_checkpoint
from slime_fipo.local.rollout import reward
from slime_fipo.records import Fate, read_records

from .rig import MICRO, metrics_without_times, micro_flags

# Lively enough for every fate but exclusion: large steps, and narrow bounds.
PPO = ["--demo-steps", "12", "--demo-lr", "5e-3", "--lr", "3e-2", "--num-rollout", "4", "--global-batch-size", "2"]
LIVELY = [*PPO, "--fipo-safety-thresh", "1.01", "--fipo-clip-ratio", "0.01"]


class Quiet(engine.Progress):
    """Keeps what it is told."""

    def __init__(self):
        super().__init__()
        self.said = []

    def say(self, message: str) -> None:
        self.said.append(message)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """``run(name, *flags)`` runs in this process.

    Returns the run directory, what was said, (weights, Δ, A) of every step and every rollout's batch. The sampled
    log-probs get noise, as engines of two kinds would have.
    """
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **options: path.write_bytes(b""))

    def run(name: str, *flags: str) -> tuple[Path, list[str], list, list]:
        used, batches, progress = [], [], Quiet()
        original, make_batch = objective.fipo_policy_loss, engine.make_rollout_batch
        generator = torch.Generator().manual_seed(7)

        def noisy_batch(*arguments):
            batch = make_batch(*arguments)
            for values in batch["rollout_log_probs"]:
                values += 0.1 * torch.randn(values.shape, generator=generator)
            batches.append(batch)
            return batch

        def spied(log_probs, old_log_probs, *rest, **options):
            loss, result = original(log_probs, old_log_probs, *rest, **options)
            used.append((result.weights.clone(), (log_probs - old_log_probs).detach(), rest[0].clone()))
            return loss, result

        with monkeypatch.context() as patch:
            patch.setattr(objective, "fipo_policy_loss", spied)
            patch.setattr(engine, "make_rollout_batch", noisy_batch)
            args = parse_arguments([*micro_flags(tmp_path), *flags, "--save", str(tmp_path / name)])
            return engine.run(args, progress).path, progress.said, used, batches

    return run


def test_records_hold_what_the_loss_used(run, tmp_path):
    """4 steps of 2 responses a rollout, groups of 4: steps see halves of groups, and the budget halves of steps."""
    folder = tmp_path / "records"
    record = ["--fipo-record", str(folder), "--fipo-record-interval", "3", "--fipo-record-samples", "4"]
    _, _, used, batches = run("run", *LIVELY, *record)
    found = read_records(folder)
    assert found.missing == []
    header = found.records[0].header
    assert {(r.header.rollout_id, r.header.step_id) for r in found.records} == {(0, 0), (0, 3), (3, 0), (3, 3)}
    assert (header.source, header.shift_from, header.steps_per_rollout) == ("local", "train", 4)
    assert (header.samples_per_rollout, header.samples_per_prompt) == (8, 4)
    assert header.config == parse_arguments([*MICRO.split(), *LIVELY]).fipo.as_dict()
    fates = set()
    for rollout in (0, 3):
        for step in (0, 3):
            records = [r for r in found.records if (r.header.rollout_id, r.header.step_id) == (rollout, step)]
            assert [r.position for r in records] == [2 * step, 2 * step + 1]
            weights, shift, advantages = (values.numpy() for values in used[4 * rollout + step])
            f = np.concatenate([np.where(r.fate & Fate.DROPPED, 0, r.influence) for r in records])
            assert np.array_equal(f, weights)  # bitwise
            assert np.array_equal(np.concatenate([r.shift for r in records]), shift)
            assert np.array_equal(np.concatenate([r.advantages for r in records]), advantages)
            if step == 0:  # the policy has not moved: no shift, and the engines agree up to rounding
                assert max(np.abs(r.shift).max() for r in records) < 1e-4
            fates |= set(np.concatenate([r.fate for r in records]).tolist())
            for r in records:
                assert r.group == r.position // 4
                own, sampled = (batches[rollout][name][r.position] for name in ("log_probs", "rollout_log_probs"))
                assert np.array_equal(r.mismatch, (own - sampled).numpy()) and np.abs(r.mismatch).max() > 1e-3
                text = "".join(header.alphabet[t - 1] for t in r.tokens if t)
                assert header.alphabet[r.prompt[0] - 1] in "0123" and header.alphabet[r.prompt[1] - 1] == "="
                assert r.reward == reward(text, "", r.tokens[-1] != 0, ";")
    assert any(fate & Fate.CLIPPED_HIGH for fate in fates) and any(fate & Fate.CLIPPED_LOW for fate in fates)
    assert any(fate & Fate.CAPPED for fate in fates) and 0 in fates


def test_recording_changes_no_bit_of_training(run, tmp_path):
    plain, *_ = run("plain", *LIVELY)
    recorded, *_ = run("recorded", *LIVELY, "--fipo-record", str(tmp_path / "records"), "--fipo-record-interval", "1")
    assert metrics_without_times(plain) == metrics_without_times(recorded)
    for name in ("rollouts_0000003", "rollouts_0000004"):
        a, b = (read_checkpoint(folder / f"checkpoints/{name}.safetensors").tensors for folder in (plain, recorded))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    # Nor is recording part of a run's configuration: with it or without it, the same command finds the run finished.
    assert "nothing was run" in run("recorded", *LIVELY)[1][0]


def test_a_record_that_cannot_be_written_is_one_warning(run, tmp_path):
    (tmp_path / "blocked").write_text("a file where the folder should be")
    directory, said, *_ = run("run", *LIVELY, "--fipo-record", str(tmp_path / "blocked"), "--fipo-record-interval", "1")
    warnings = [line for line in said if "--fipo-record" in line]
    assert len(warnings) == 1 and f"{tmp_path}/blocked: cannot be written" in warnings[0]
    assert metrics_without_times(directory) == metrics_without_times(run("plain", *LIVELY)[0])


def test_policy_loss_and_rollout_log_probs(run, tmp_path):
    """With --loss-type policy_loss every weight is 1; with --use-rollout-logprobs the first shift is the mismatch."""
    folder = tmp_path / "records"
    flags = ["--loss-type", "policy_loss", "--use-rollout-logprobs", "--fipo-record", str(folder)]
    run("run", *PPO, *flags)
    found = read_records(folder)
    assert {r.header.rollout_id for r in found.records} == {0} and found.missing == []
    for r in found.records:
        assert r.header.shift_from == "rollout" and (r.influence == 1).all()
        if r.header.step_id == 0:
            np.testing.assert_allclose(r.shift, r.mismatch, atol=1e-5)


@pytest.mark.parametrize("folder", ["run/checkpoints", "run/checkpoints/records", "elsewhere/../run/checkpoints/a/b"])
def test_not_among_the_checkpoints(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is inside the run's checkpoints"):
        parse_arguments([*MICRO.split(), "--save", str(tmp_path / "run"), "--fipo-record", folder])
    parse_arguments([*MICRO.split(), "--save", str(tmp_path / "run"), "--fipo-record", "run/records"])
