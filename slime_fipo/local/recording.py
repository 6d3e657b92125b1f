"""Token records of the embedded engine: what its loss saw, handed to ``slime_fipo.records``.

Recording reads what a step computed and changes none of it. Which responses are recorded, and the files, are
``slime_fipo.records``' business.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch

from slime_fipo.algorithm import FipoWeights

from ..records import StepHeader, write_step
from ..records.arguments import RecordSettings
from ..records.choice import chosen_groups
from ..records.packed import RECORDED_METRICS, token_records
from .train_data import select


class Recorder:
    """Writes the records of one run; ``say`` shows the one warning of a record that cannot be written."""

    def __init__(self, settings: RecordSettings, args: argparse.Namespace, say: Callable[[str], None]):
        self.settings, self.args, self.say = settings, args, say
        self.warned = False

    def __call__(self, batch: dict[str, list], shift: torch.Tensor, fipo: FipoWeights) -> None:
        """Record the chosen responses of one optimizer step.

        Args:
            batch: the step's samples, of consecutive rollout positions.
            shift: Δ [T], packed, as the loss used it.
            fipo: the weights that multiplied the loss.
        """
        args, positions = self.args, batch["rollout_position"]
        samples = args.rollout_batch_size * args.n_samples_per_prompt
        header = StepHeader(
            rollout_id=batch["rollout_id"][0],
            step_id=positions[0] // args.global_batch_size,
            steps_per_rollout=samples // args.global_batch_size,
            config=args.fipo.as_dict(),
            source="local",
            shift_from="rollout" if args.use_rollout_logprobs else "train",
            samples_per_rollout=samples,
            samples_per_prompt=args.n_samples_per_prompt,
            alphabet=args.alphabet,
        )
        groups = chosen_groups(
            self.settings,
            rollout_id=header.rollout_id,
            step_id=header.step_id,
            steps_per_rollout=header.steps_per_rollout,
            positions=range(positions[0], positions[-1] + 1),
            samples_per_prompt=args.n_samples_per_prompt,
        )
        if not groups:
            return
        chosen = [position - positions[0] for group in groups for position in group]
        lengths = batch["response_lengths"]

        def packed(values: torch.Tensor) -> np.ndarray:
            parts = values.detach().cpu().split(lengths)
            return torch.cat([parts[i] for i in chosen]).numpy()

        part = select(batch, chosen)
        own, engine = torch.cat(part["log_probs"]), torch.cat(part["rollout_log_probs"])
        tokens = [
            np.split(tokens.cpu().numpy(), [len(tokens) - length])
            for tokens, length in zip(part["tokens"], part["response_lengths"], strict=True)
        ]
        records = token_records(
            [prompt for prompt, _ in tokens],
            [response for _, response in tokens],
            part["rollout_position"],
            [position // args.n_samples_per_prompt for position in part["rollout_position"]],
            part["raw_reward"],
            loss_mask=torch.cat(part["loss_masks"]).cpu().numpy(),
            shift=packed(shift),
            advantages=torch.cat(part["advantages"]).cpu().numpy(),
            metrics={name: packed(fipo.metrics[name]) for name in RECORDED_METRICS},
            mismatch=(own - engine).cpu().numpy(),
        )
        try:
            write_step(self.settings.folder, header, records)
        except OSError as error:
            if not self.warned:
                self.say(
                    f"--fipo-record {self.settings.folder}: cannot be written ({error}); training goes on, and further"
                    " records that cannot be written are not mentioned"
                )
            self.warned = True
