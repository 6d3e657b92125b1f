"""The arms of a study: a name, and the flags of ``slime-fipo local`` by which it differs from the others.

What pairs the arms (seed, data and their order, base model, evaluation, number of rollouts) is the study's, and no
arm may change it.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from slime_fipo.algorithm import fipo_dests

from ...errors import UserError
from ..arguments import flag_of, given_arguments

# What an arm may set: the objective, the optimizer, and what is sampled to train on.
ARM_DESTS = frozenset(
    (
        *fipo_dests(),
        *("loss_type", "weight_control", "eps_clip", "eps_clip_high", "eps_clip_c", "use_rollout_logprobs"),
        *("calculate_per_token_loss", "rewards_normalization", "grpo_std_normalization"),
        *("lr", "weight_decay", "adam_beta1", "adam_beta2", "clip_grad"),
        *("global_batch_size", "num_steps_per_rollout", "rollout_batch_size", "n_samples_per_prompt"),
        *("dynamic_sampling", "max_sampling_rounds", "sampling_stream"),
    )
)
# What tells one objective from another: arms set it, and it is no flag for all of them.
OBJECTIVE_DESTS = frozenset((*fipo_dests(), "loss_type", "weight_control", "eps_clip_c", "sampling_stream"))
BASE_FOLDER = "base"


@dataclass(frozen=True)
class Arm:
    """``flags`` come after those of the study, so they win."""

    name: str
    flags: tuple[str, ...]

    @property
    def folder(self) -> str:
        """In ``seed-N/``."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


def _arm(name: str, flags: str) -> Arm:
    return Arm(name, tuple(flags.split()))


# DAPO has the dual clip of FIPO's authors too, so that the arms differ by the weights alone.
MAIN = (
    _arm("DAPO", "--loss-type policy_loss --eps-clip-c 10"),
    _arm("FIPO 7b", "--fipo-preset 7b"),
    _arm("FIPO 32b", "--fipo-preset 32b"),
    _arm("FIPO unclipped", "--fipo-preset 7b --fipo-unclipped"),
    _arm("7b shuffled in response", "--fipo-preset 7b --weight-control shuffled-in-response"),
    _arm("7b shuffled in batch", "--fipo-preset 7b --weight-control shuffled-in-batch"),
    _arm("7b batch mean", "--fipo-preset 7b --weight-control batch-mean"),
)
# The paper's ablations (App. D, F). A halved mini-batch is compared with FIPO at the full one.
ABLATIONS = (
    _arm("FIPO 7b", "--fipo-preset 7b"),
    _arm("τ = 8", "--fipo-preset 7b --fipo-decay-rate 8"),
    _arm("τ = 128", "--fipo-preset 7b --fipo-decay-rate 128"),
    _arm("τ = 256", "--fipo-preset 7b --fipo-decay-rate 256"),
    _arm("no filter of extreme ratios", "--fipo-preset 7b --fipo-dual-clip-c none --fipo-max-dual-clipped-tokens none"),
    _arm("weights in [1, 1.2]", "--fipo-preset 7b --fipo-clip-high-only"),
    _arm("mini-batch halved", "--fipo-preset 7b --global-batch-size 16"),
)
SETS = {"main": MAIN, "ablations": ABLATIONS}


def parse_arm(text: str) -> Arm:
    """``NAME=flags`` of the command line; flags are split as a shell does.

    Raises:
        UserError: it has another form, or a flag that an arm must not set; the message names arm and flag.
    """
    name, separator, flags = (part.strip() for part in text.partition("="))
    if not separator or not name.isprintable():
        raise UserError(f"--arm {text!r}; give NAME='flags', such as --arm 'half=--lr 5e-5'")
    try:
        arm = Arm(name, tuple(shlex.split(flags)))
    except ValueError as error:
        raise UserError(f"--arm {text!r}: {error}; give NAME='flags'") from None
    if arm.folder in ("", BASE_FOLDER):
        raise UserError(f"--arm {name!r} is not a name for an arm; choose one with letters or digits, and not 'base'")
    try:
        given = given_arguments(list(arm.flags))
    except UserError as error:
        raise UserError(f"--arm {name!r}: {error}") from None
    for dest in given:
        if dest not in ARM_DESTS:
            raise UserError(f"--arm {name!r}: {flag_of(dest)} is the same for all arms; drop it there")
    return arm


def check_arms(arms: tuple[Arm, ...], baseline: str) -> None:
    """Names must have folders of their own, and one of them is the baseline.

    Raises:
        UserError: names the flag and the arm.
    """
    folders = [arm.folder for arm in arms]
    for arm in arms:
        if folders.count(arm.folder) > 1:
            raise UserError(f"--arm {arm.name!r}: another arm has the same name or folder ({arm.folder}); rename it")
    if baseline not in (names := [arm.name for arm in arms]):
        raise UserError(f"--baseline {baseline!r} is none of the arms: {', '.join(map(repr, names))}")
    if len(arms) < 2:
        raise UserError("--arm: one arm is nothing to compare; give at least two")
