"""The placebos: what they keep of FIPO's weights, what they take away, and that the loss uses them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slime_fipo import FipoConfig, fipo_policy_loss, fipo_weights
from slime_fipo.errors import UserError
from slime_fipo.local.controls import CONTROLS, controlled_weights
from slime_fipo.local.model import packed_logits
from slime_fipo.local.objective import policy_objective, policy_step
from slime_fipo.local.random_streams import seeded_generator

from .rig import CPU, tiny_args
from .test_objective import LENGTHS, setup  # noqa: F401 -- a fixture

lengths_and_seed = (st.lists(st.integers(0, 30), min_size=1, max_size=6), st.integers(0, 2**31))


def weights_of(lengths: list[int], seed: int):
    """FIPO's weights of random tokens, most of them different, and the loss mask."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    old, shift, advantages = (torch.randn(tokens, generator=generator) for _ in range(3))
    mask = torch.rand(tokens, generator=generator) > 0.2
    config = FipoConfig(clip_influence=False, decay_rate=4.0, safety_thresh=None, dual_clip_c=2.0)
    return fipo_weights(old + 0.5 * shift, old, advantages, mask, lengths, config), mask


@given(*lengths_and_seed)
@pytest.mark.parametrize("name", CONTROLS)
def test_what_a_control_keeps(name, lengths, seed):
    fipo, mask = weights_of(lengths, seed)
    other = controlled_weights(name, fipo, mask, lengths, seeded_generator(CPU, seed))
    again = controlled_weights(name, fipo, mask, lengths, seeded_generator(CPU, seed))
    assert torch.equal(other.weights, again.weights)
    torch.testing.assert_close(other.weights.sum(), fipo.weights.sum(), rtol=1e-4, atol=1e-4)
    dropped = ~fipo.keep.repeat_interleave(torch.tensor(lengths))
    assert (other.weights[dropped] == 0).all()
    assert torch.equal(other.weights[~mask], fipo.weights[~mask])
    takes_part = mask & ~dropped
    if name == "batch-mean" and takes_part.any():
        assert (other.weights[takes_part] == other.weights[takes_part][0]).all()
    elif name == "shuffled-in-batch":
        assert torch.equal(other.weights[takes_part].sort().values, fipo.weights[takes_part].sort().values)
    elif name == "shuffled-in-response":
        for now, before in zip(other.weights.split(lengths), fipo.weights.split(lengths), strict=True):
            assert torch.equal(now.sort().values, before.sort().values)
    applied = torch.where(takes_part, other.weights, other.metrics["influence_weight"])
    assert torch.equal(other.metrics["influence_weight"], applied)
    assert torch.equal(other.metrics["influence_deviation"], (applied - 1).abs())
    assert other.future_kl is fipo.future_kl and other.keep is fipo.keep


@pytest.mark.parametrize("name", ["shuffled-in-response", "shuffled-in-batch"])
def test_a_shuffle_takes_the_place_away(name):
    """Over many orders a token's weight is the mean of those it may get, whatever its own was."""
    lengths = [6, 10]
    fipo, _ = weights_of(lengths, 3)
    mask = torch.ones(16, dtype=torch.bool)
    assert fipo.keep.all()
    drawn = torch.stack(
        [controlled_weights(name, fipo, mask, lengths, seeded_generator(CPU, i)).weights for i in range(4000)]
    )
    parts = [fipo.weights] if name == "shuffled-in-batch" else fipo.weights.split(lengths)
    expected = torch.cat([part.mean().expand_as(part) for part in parts])
    spread = drawn.std(0) / 4000**0.5
    assert ((drawn.mean(0) - expected).abs() < 5 * spread).all()
    assert (fipo.weights - expected).abs().max() > 50 * spread.max()  # so that a control that moves nothing would fail


@pytest.mark.parametrize("name", CONTROLS)
def test_the_loss_has_the_controls_weights(setup, name):  # noqa: F811
    args, model, batch = setup
    args.fipo, args.weight_control = FipoConfig(decay_rate=3.0, clip_ratio_high=0.5), name
    batch["rollout_id"], batch["rollout_position"] = [7] * 4, [4, 5, 6, 7]
    masks = torch.cat(batch["loss_masks"])
    logits = packed_logits(model, batch["tokens"])
    seen = []
    loss, metrics = policy_objective(args, batch, logits, lambda batch, shift, fipo: seen.append((shift, fipo)))
    [(shift, fipo)] = seen
    old, advantages = torch.cat(batch["log_probs"]), torch.cat(batch["advantages"])
    tokens = (shift + old, old, advantages, masks, batch["response_lengths"], args.fipo)
    plain = fipo_weights(*tokens)
    assert not torch.equal(fipo.weights, plain.weights)
    torch.testing.assert_close(fipo.weights.sum(), plain.weights.sum())
    per_token = fipo_policy_loss(*tokens)[0] / plain.weights * fipo.weights
    parts = zip(per_token.split(batch["response_lengths"]), batch["loss_masks"], strict=True)
    expected = sum((part * mask).sum() / mask.sum() for part, mask in parts) / len(LENGTHS)
    torch.testing.assert_close(loss, expected)
    deviation = ((fipo.weights - 1).abs() * masks).sum() / masks.sum()
    torch.testing.assert_close(metrics["fipo/influence_deviation"], deviation)

    def applied(position: int, stream: int) -> torch.Tensor:
        batch["rollout_position"], args.sampling_stream = [position] * 4, stream
        policy_objective(args, batch, logits, lambda batch, shift, fipo: seen.append(fipo.weights))
        return seen[-1]

    if name != "batch-mean":  # another order at every step and in every stream, the same if the step is done again
        assert torch.equal(applied(4, 0), fipo.weights)
        assert not torch.equal(applied(8, 0), fipo.weights) and not torch.equal(applied(4, 1), fipo.weights)
    assert "train/loss" in policy_step(args, model, batch)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--loss-type", "policy_loss"], "--weight-control has no effect with --loss-type policy_loss"),
        (["--fipo-record", "records"], "--fipo-record records FIPO's own weights"),
    ],
)
def test_where_a_control_has_no_place(flags, says):
    with pytest.raises(UserError, match=f"^{says}"):
        tiny_args("--weight-control", "batch-mean", *flags)
