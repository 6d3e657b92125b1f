"""The step's loss: against the reduction written out by hand, and what a step does to the model."""

import pytest
import torch

from slime_fipo import FipoConfig, fipo_policy_loss
from slime_fipo.local import training
from slime_fipo.local.model import packed_logits
from slime_fipo.local.objective import policy_objective, policy_step
from slime_fipo.local.train_data import response_log_probs
from slime_fipo.local.training import demonstration_lr, make_optimizer, train_on_rollout

from .rig import tiny_args, tiny_model

LENGTHS = [(3, 4), (5, 1), (2, 7), (4, 3)]  # prompt, response


@pytest.fixture
def setup():
    args = tiny_args("--init-method-std", "0.5", "--rollout-temperature", "0.8")
    model, alphabet = tiny_model(args)
    generator = torch.Generator().manual_seed(5)
    batch = {
        "tokens": [torch.randint(1, alphabet.size, (p + r,), generator=generator) for p, r in LENGTHS],
        "total_lengths": [p + r for p, r in LENGTHS],
        "response_lengths": [r for _, r in LENGTHS],
        "loss_masks": [torch.ones(r, dtype=torch.int) for _, r in LENGTHS],
        "advantages": [torch.full((r,), a) for (_, r), a in zip(LENGTHS, (1.5, -0.5, -1.0, 0.3), strict=True)],
    }
    batch["loss_masks"][2][1:4] = 0
    with torch.no_grad():
        now, _ = response_log_probs(packed_logits(model, batch["tokens"]), batch, args.rollout_temperature)
    for name, scale in (("log_probs", 0.2), ("rollout_log_probs", 0.6)):
        noisy = now + scale * torch.randn(now.shape, generator=generator)
        batch[name] = list(noisy.split(batch["response_lengths"]))
    return args, model, batch


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("use_rollout_logprobs", [False, True])
def test_loss_and_gradient_equal_the_objective_reduced_by_hand(setup, per_token, use_rollout_logprobs):
    args, model, batch = setup
    args.calculate_per_token_loss, args.use_rollout_logprobs = per_token, use_rollout_logprobs
    args.eps_clip, args.eps_clip_high, args.fipo = 0.1, 0.15, FipoConfig(decay_rate=3.0, clip_ratio_high=0.5)
    old = batch["rollout_log_probs" if use_rollout_logprobs else "log_probs"]

    log_probs = []
    for tokens, (prompt, response) in zip(batch["tokens"], LENGTHS, strict=True):
        logits = model(tokens[None], torch.arange(len(tokens))[None], None)[0] / 0.8
        log_probs += [logits[t - 1].log_softmax(-1)[tokens[t]] for t in range(prompt, prompt + response)]
    losses, fipo = fipo_policy_loss(
        torch.stack(log_probs),
        torch.cat(old),
        torch.cat(batch["advantages"]),
        torch.cat(batch["loss_masks"]),
        batch["response_lengths"],
        args.fipo,
        eps_clip=0.1,
        eps_clip_high=0.15,
    )
    masks = torch.cat(batch["loss_masks"])
    if per_token:
        expected = (losses * masks).sum() / masks.sum()
    else:
        parts = zip(losses.split([r for _, r in LENGTHS]), batch["loss_masks"], strict=True)
        expected = sum((part * mask).sum() / mask.sum() for part, mask in parts) / len(LENGTHS)
    wanted = torch.autograd.grad(expected, model.parameters())

    metrics = policy_step(args, model, batch)
    torch.testing.assert_close(metrics["train/loss"], expected.detach(), atol=1e-6, rtol=1e-5)
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-4)
    deviation = (fipo.metrics["influence_deviation"] * masks).sum() / masks.sum()
    assert deviation > 0.05
    torch.testing.assert_close(metrics["fipo/influence_deviation"], deviation)


def test_policy_loss_is_ppo_without_weights(setup):
    args, model, batch = setup
    plain = tiny_args("--loss-type", "policy_loss", "--rollout-temperature", "0.8")
    logits = packed_logits(model, batch["tokens"])
    loss, metrics = policy_objective(plain, batch, logits)
    log_probs, _ = response_log_probs(logits, batch, 0.8)
    ratio, advantages = (log_probs - torch.cat(batch["log_probs"])).exp(), torch.cat(batch["advantages"])
    tokens = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)
    parts = zip(tokens.split(batch["response_lengths"]), batch["loss_masks"], strict=True)
    expected = sum((part * mask).sum() / mask.sum() for part, mask in parts) / len(LENGTHS)
    torch.testing.assert_close(loss, expected)
    assert metrics["fipo/influence_deviation"] == 0
    assert policy_objective(args, batch, logits)[0] != loss


def test_a_fully_masked_batch_has_a_finite_loss(setup):
    args, model, batch = setup
    batch["loss_masks"] = [torch.zeros_like(mask) for mask in batch["loss_masks"]]
    for args.calculate_per_token_loss in (False, True):
        metrics = policy_step(args, model, batch)
        assert all(value == 0 for name, value in metrics.items() if name.startswith("train/"))


def test_steps_of_global_batch_size_move_the_policy(setup, monkeypatch):
    """Four steps of one sample: the first sees no drift, later ones do, and each response gains what it should."""
    args, model, batch = setup
    args.global_batch_size = 1
    for name in ("log_probs", "rollout_log_probs"):
        with torch.no_grad():
            now, _ = response_log_probs(packed_logits(model, batch["tokens"]), batch, 0.8)
        batch[name] = list(now.split(batch["response_lengths"]))
    seen = []

    def step(args, model, part, recorder):
        metrics = policy_step(args, model, part, recorder)
        seen.append((part["response_lengths"][0], metrics["fipo/future_kl"].item()))
        return metrics

    monkeypatch.setattr(training, "policy_step", step)
    train_on_rollout(args, model, make_optimizer(args, model, 1e-2), batch)
    assert [lengths for lengths, _ in seen] == [r for _, r in LENGTHS]
    assert seen[0][1] == pytest.approx(0, abs=1e-5) and all(abs(drift) > 1e-3 for _, drift in seen[1:])
    with torch.no_grad():
        after, _ = response_log_probs(packed_logits(model, batch["tokens"]), batch, 0.8)
    gains = [part.sum().item() for part in (after - now).split(batch["response_lengths"])]
    assert gains[0] > 0 > gains[2]


def test_demonstration_lr_warms_up_and_decays_to_a_tenth():
    args = tiny_args()
    rates = [demonstration_lr(args, step) for step in range(args.demo_steps)]
    assert max(rates) == pytest.approx(args.demo_lr, rel=1e-3)
    assert rates[0] == pytest.approx(args.demo_lr / 20) and rates[-1] == pytest.approx(args.demo_lr / 10, rel=0.01)
