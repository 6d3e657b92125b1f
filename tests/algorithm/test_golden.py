"""The authors' recorded numbers: Future-KL, weights, losses, gradients, dropped responses and shares."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from slime_fipo import FipoConfig, fipo_policy_loss

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = {case["name"]: case for case in json.loads((GOLDEN / "cases.json").read_text())}
IMPLS = ("chunked", "scan")


class GoldenCase:
    """One recorded batch, its tensors packed: every response's tokens end to end, right padding left out."""

    def __init__(self, name):
        settings = CASES[name]
        self.arrays = np.load(GOLDEN / f"{name}.npz")
        self.lengths = self.arrays["lengths"].tolist()
        self.config = dict(
            decay_rate=settings["tau"],
            clip_influence=settings["clip"] > 0,
            clip_high_only=settings["high_only"],
            safety_thresh=settings["safe"],
            dual_clip_c=settings["c"],
        )
        if settings["clip"] > 0:
            self.config.update(clip_ratio_low=settings["clip"], clip_ratio_high=settings["clip"])

    def packed(self, key, dtype=torch.float64):
        rows = torch.from_numpy(self.arrays[key].astype(np.float64))
        return torch.cat([row[:n] for row, n in zip(rows, self.lengths, strict=True)]).to(dtype)

    def metric(self, key):
        return float(self.arrays[f"metric/{key}"])


def close(ours, recorded, where, tolerance=2e-5):
    recorded = recorded[where]
    worst = (ours.double()[where] - recorded).abs().max().item()
    assert worst <= tolerance * max(1.0, recorded.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", CASES)
def test_recorded_numbers(name, impl, dtype):
    case = GoldenCase(name)
    config = FipoConfig(**case.config, impl=impl, chunk_size=64)
    mask, final_mask = case.packed("mask").bool(), case.packed("final_mask").bool()
    log_probs = case.packed("log_probs", dtype).requires_grad_()

    loss, result = fipo_policy_loss(
        log_probs,
        case.packed("old_log_probs", dtype),
        case.packed("advantages", dtype),
        case.packed("mask", dtype),
        case.lengths,
        config,
    )
    close(result.future_kl, case.packed("future_kl"), mask)
    close(result.weights, case.packed("influence_weights"), final_mask)
    close(loss.detach(), case.packed("pg_losses"), final_mask)

    # The authors leave dropped responses out of the mean's denominator.
    ((loss * final_mask).sum() / final_mask.sum()).backward()
    gradient = case.packed("grad_log_probs")
    assert (log_probs.grad.double() - gradient).abs().max() <= 2e-5 * gradient.abs().max()

    rows = torch.from_numpy(case.arrays["mask"]), torch.from_numpy(case.arrays["final_mask"])
    dropped = (rows[0].sum(1) > 0) & (rows[1].sum(1) == 0)
    assert result.keep.tolist() == (~dropped).tolist()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", CASES)
def test_recorded_shares(name, impl):
    case = GoldenCase(name)
    config = FipoConfig(**case.config, impl=impl)
    mask = case.packed("mask").bool()
    _, result = fipo_policy_loss(
        *(case.packed(key, torch.float32) for key in ("log_probs", "old_log_probs", "advantages", "mask")),
        case.lengths,
        config,
    )
    recorded = {
        "influence_weight": "influence_weights_mean",
        "clip_high_frac": "clip_frac_upper",
        "clip_low_frac": "clip_frac_lower",
        "neg_ratio_2_3": "neg_ratio_2_3",
        "neg_ratio_3_4": "neg_ratio_3_4",
        "neg_ratio_4_c": "neg_ratio_4_10",
    }
    for ours, theirs in recorded.items():
        mean = result.metrics[ours][mask].double().mean().item()
        assert mean == pytest.approx(case.metric(theirs), abs=1e-6), ours
    clipped = (result.metrics["clip_high_frac"] + result.metrics["clip_low_frac"])[mask].double().mean().item()
    assert clipped == pytest.approx(case.metric("total_clip_frac"), abs=1e-6)


def test_the_cases_exercise_what_they_are_for():
    """Spikes, dropped responses, holes and both ends of the clip do occur: the comparisons above can fail."""
    dropped = [n for n in CASES if (c := GoldenCase(n)).packed("mask").sum() != c.packed("final_mask").sum()]
    assert set(dropped) == {"dual_clip_and_sequence_filter", "token_level_advantages"}
    holes = [n for n in CASES if not GoldenCase(n).packed("mask").bool().all()]
    assert holes == ["tool_masks"]
