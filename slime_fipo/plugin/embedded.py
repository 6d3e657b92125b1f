"""slime's real ``loss_function`` under the embedded engine: the same model and data, trained through slime's loss path.

This is how ``slime-fipo local --slime-root`` shows that the plugin in slime learns what the embedded objective learns.
Megatron's own schedule drives forward and backward, as slime's trainer does. slime's sampling and actors stay out.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from ..algorithm import FipoConfig
from .arguments import LOSS_PATH

# The part of slime's namespace that its loss reads beside what the embedded engine has flags for, at slime's defaults.
_SLIME_DEFAULTS = {
    "allgather_cp": False,
    "compute_advantages_and_returns": True,
    "custom_pg_loss_reducer_function_path": None,
    "custom_tis_function_path": None,
    "entropy_coef": 0.0,
    "get_mismatch_metrics": False,
    "kl_coef": 0.0,
    "kl_loss_coef": 0.0,
    "log_probs_chunk_size": -1,
    "qkv_format": "thd",
    "recompute_loss_function": False,
    "rollout_top_p": 1.0,
    "use_kl_loss": False,
    "use_opsm": False,
    "use_tis": False,
    "use_unbiased_kl": False,
}
_SHARED = (
    "advantage_estimator",
    "calculate_per_token_loss",
    "eps_clip",
    "eps_clip_c",
    "eps_clip_high",
    "global_batch_size",
    "n_samples_per_prompt",
    "rollout_batch_size",
    "rollout_temperature",
    "use_rollout_logprobs",
)


class SlimeStep:
    """Forward and backward of one optimizer step through slime's ``loss_function`` and Megatron's schedule.

    Args:
        root: slime's checkout; goes to the front of ``sys.path``.
        args: the embedded engine's namespace.
        forward: ``(model, tokens) -> logits`` [1, sum of lengths, vocabulary] of packed sequences.

    Raises:
        ValueError: ``root`` holds no slime, or one that cannot be imported; names ``--slime-root`` and what is missing.
    """

    def __init__(self, root: str, args: argparse.Namespace, forward: Callable) -> None:
        self.loss_function = _import_loss_function(root)
        self.forward = forward
        self.args = _slime_namespace(args)

    def __call__(self, args: argparse.Namespace, model: torch.nn.Module, batch: dict) -> dict[str, torch.Tensor]:
        """Leave the step's gradient in the model's parameters.

        Returns:
            slime's metrics as detached scalars: its own under ``train/``, FIPO's under ``fipo/``.
        """
        from megatron.core.pipeline_parallel import get_forward_backward_func

        samples = len(batch["tokens"])
        denominators = [mask.sum() for mask in batch["loss_masks"]]
        micro_batch = {
            **batch,
            "unconcat_tokens": batch["tokens"],
            "rollout_mask_sums": denominators,
            "group_mask_sums": denominators,  # v0.3.0's name
        }

        def forward_step(data, model):
            step = next(data)
            return self.forward(model, step["tokens"]), partial(self.loss_function, self.args, step, 1, samples)

        with _schedule_on(batch["tokens"][0].device):
            [log] = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iter([micro_batch]),
                model=model,
                num_microbatches=1,
                seq_length=max(batch["total_lengths"]),
                micro_batch_size=samples,
                forward_only=False,
            )
        values = log["values"].detach()
        count = values[0] if args.calculate_per_token_loss else samples
        names = (name if name.startswith("fipo/") else f"train/{name}" for name in log["keys"])
        return dict(zip(names, values[1:] / count, strict=True))


def _import_loss_function(root: str) -> Callable:
    package = Path(root, "slime", "backends", "megatron_utils", "loss.py")
    if not package.is_file():
        raise ValueError(f"--slime-root {root} is no checkout of slime: it has no {package.relative_to(root)}")
    sys.path.insert(0, os.path.abspath(root))
    try:
        return importlib.import_module("slime.backends.megatron_utils.loss").loss_function
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--slime-root {root}: slime needs the package {error.name}; pip install '/path/to/slime-fipo[slime]'"
        ) from error


def _slime_namespace(args: argparse.Namespace) -> argparse.Namespace:
    shared = {name: getattr(args, name) for name in _SHARED}
    if args.loss_type == "policy_loss":
        return argparse.Namespace(**_SLIME_DEFAULTS, **shared, loss_type="policy_loss")
    config: FipoConfig = args.fipo
    fipo = {f"fipo_{name}": "none" if value is None else value for name, value in config.as_dict().items()}
    fipo["fipo_unclipped"] = not fipo.pop("fipo_clip_influence")
    if fipo["fipo_unclipped"]:
        fipo = {k: v for k, v in fipo.items() if not k.startswith("fipo_clip")}
    return argparse.Namespace(
        **_SLIME_DEFAULTS,
        **shared,
        **fipo,
        fipo_log_detail=True,
        loss_type="custom_loss",
        custom_loss_function_path=LOSS_PATH,
    )


@contextlib.contextmanager
def _schedule_on(device: torch.device):
    """Megatron's schedule makes its token count on ``"cuda"``; without a GPU, make it on ``device``."""
    if device.type == "cuda":
        yield
        return
    zeros = torch.zeros

    def zeros_here(*size, **kwargs):
        if kwargs.get("device") == "cuda":
            kwargs["device"] = device
        return zeros(*size, **kwargs)

    torch.zeros = zeros_here
    try:
        yield
    finally:
        torch.zeros = zeros
