"""The loop in float32: what SGLang and Megatron differ by, and the actor's loss and gradients against the objective.

They are computed again from the equations: the samples are slime's own dump, the model is transformers' Qwen3 in
float64, the weights are those that the actor had before the step, and FIPO's weights are the float64 oracle's.
"""

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen3ForCausalLM

from slime_fipo.algorithm import FipoConfig
from slime_fipo.local.arguments import parse_arguments
from slime_fipo.rehearsal.qwen3 import hugging_face_weights
from tests.algorithm import oracle

from .model import SIZES
from .test_loop import DEVIATION, DIFFERENCE, DISK, SGLANG_LOG_PROBS

# Not the defaults: a flag that does not arrive shows.
CONFIG = FipoConfig(decay_rate=8.0, clip_ratio_low=0.3, clip_ratio_high=0.4)
FLAGS = ("--fipo-decay-rate", "8", "--fipo-clip-ratio-low", "0.3", "--fipo-clip-ratio-high", "0.4")
EPS_CLIP, EPS_CLIP_HIGH = 0.2, 0.28  # loop.py's
PER_STEP = 8  # samples; loop.py's --global-batch-size
TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=[1, 2], ids=["cp1-sample_mean", "cp2-token_mean"])
def ranks(request):
    return request.param


@pytest.fixture(scope="module")
def capture(ranks, loop) -> Path:
    folder = loop.folder / f"capture-cp{ranks}"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def run(ranks, capture, loop):
    return loop(
        f"float32_cp{ranks}",
        ranks + 1,
        Path(__file__).with_name("float32_train.py"),
        *SGLANG_LOG_PROBS,
        *DISK,
        *FLAGS,
        *(("--calculate-per-token-loss",) if ranks == 2 else ()),
        *("--actor-num-gpus-per-node", ranks, "--context-parallel-size", ranks, "--sglang-dtype", "float32"),
        *("--save-debug-train-data", f"{capture}/{{{{rollout_id}}}}.pt"),  # start_run formats flags
        *("--custom-megatron-before-train-step-hook-path", "tests.whole.capture.before_train_step"),
        dtype="float32",
    )


def test_sglang_and_megatron_agree_to_four_digits(run):
    assert max(run.first_steps(DIFFERENCE)) < 1e-4
    assert all(value > 0.01 for value in run.later_steps(DEVIATION))  # weights of 1 would say little below


def test_loss_and_gradients_are_the_objectives(run, ranks, capture, loop):
    reported = run.steps("train/loss")
    args = parse_arguments([*SIZES.split(), "--save", "unused"])
    for rollout in range(3):
        samples = torch.load(capture / f"{rollout}.pt", weights_only=False)["samples"]
        for step in range(2):
            had = torch.load(capture / f"{rollout}-{step}.pt")
            model = load(loop.model("float32"), as_hugging_face(had["weights"], args))
            loss = objective(model, samples[PER_STEP * step : PER_STEP * (step + 1)], per_token=ranks == 2)
            loss.backward()
            assert reported[2 * rollout + step] == pytest.approx(loss.item(), abs=TOLERANCE)
            assert_gradients_equal(model, as_hugging_face(had["gradients"], args))


def as_hugging_face(tensors: dict[str, torch.Tensor], args: Namespace) -> dict[str, torch.Tensor]:
    """Megatron's weights or gradients under Hugging Face's names."""
    for fused, norm in (("self_attention.linear_qkv", "input"), ("mlp.linear_fc1", "pre_mlp")):
        tensors = {
            name.replace(f"{fused}.layer_norm_weight", f"{norm}_layernorm.weight"): tensor
            for name, tensor in tensors.items()
        }
    return hugging_face_weights(tensors, args)


def load(checkpoint: Path, weights: dict[str, torch.Tensor]) -> Qwen3ForCausalLM:
    model = Qwen3ForCausalLM.from_pretrained(checkpoint, dtype=torch.float64)
    model.load_state_dict(weights)
    return model


def objective(model: Qwen3ForCausalLM, samples: list[dict], *, per_token: bool) -> torch.Tensor:
    """The step's loss: mean over samples of their tokens' means, or over all tokens."""
    losses, counts = [], []
    for sample in samples:
        tokens, response = torch.as_tensor(sample["tokens"])[None], sample["response_lengths"]
        log_probs = model(tokens).logits[0, :-1].log_softmax(-1).gather(-1, tokens[0, 1:, None])[-response:, 0]
        old, advantages, mask = (
            torch.as_tensor(sample[key]).double() for key in ("rollout_log_probs", "advantages", "loss_masks")
        )
        seen = (x.detach().numpy() for x in (log_probs, old, advantages, mask))
        weights, _, _ = oracle.weights(*seen, [response], CONFIG)
        ratio = (log_probs - old).exp()
        loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - EPS_CLIP, 1 + EPS_CLIP_HIGH))
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * CONFIG.dual_clip_c), loss)
        losses.append((mask * torch.as_tensor(np.asarray(weights)) * loss).sum())
        counts.append(mask.sum())
    losses, counts = torch.stack(losses), torch.stack(counts)
    return losses.sum() / counts.sum() if per_token else (losses / counts).mean()


def assert_gradients_equal(model: Qwen3ForCausalLM, actual: dict[str, torch.Tensor]) -> None:
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert expected.keys() == actual.keys() - {"lm_head.weight"}  # the embedding's
    for name, gradient in expected.items():
        difference = (actual[name] - gradient).abs().max().item()
        print(name, difference, gradient.abs().max().item())
        assert difference <= TOLERANCE * max(1.0, gradient.abs().max().item()), name
