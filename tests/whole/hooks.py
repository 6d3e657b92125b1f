"""Hooks that the whole loop calls by path."""

import asyncio
from itertools import count
from pathlib import Path

FIRST_TURN, SECOND_TURN = 8, 12  # tokens at most
TOOL_SAYS = "=1+1+1+1;"
PER_ROLLOUT = 16

_rewards = count(1)  # slime asks for all of them in one process


async def reward(args, sample, **kwargs) -> float:
    """1 for the first of four responses to a prompt, whatever it says: no step is without a gradient."""
    return float(sample.index % 4 == 0)


async def held_reward(args, sample, **kwargs) -> float:
    """:func:`reward`, but the second rollout waits there for as long as the file that it writes beside ``--save``."""
    held = Path(f"{args.save}.held")
    if next(_rewards) == PER_ROLLOUT + 1:
        held.touch()
    while held.exists():
        await asyncio.sleep(0.1)
    return await reward(args, sample)


def answer(args, sample, **kwargs) -> None:
    """Give responses the right answer: all of a prompt's, none, or every second, by the prompt's number.

    For ``--rollout-sample-hook-path``, before the reward. An evaluation's prompts have no number.
    """
    kind = kind_of_group(sample.group_index)
    if kind == "right" or (kind == "mixed" and sample.index % 2):
        sample.response += f"\nAnswer: {sample.label}"


def kind_of_group(group_index: int | None) -> str:
    return "mixed" if group_index is None else ("right", "wrong", "mixed", "mixed")[group_index % 4]


async def two_turns(args, sample, sampling_params):
    """Two turns of the model, and between them tokens that it did not write and is not trained on."""
    from slime.rollout import sglang_rollout

    await sglang_rollout.generate(args, sample, {**sampling_params, "max_new_tokens": FIRST_TURN})
    told = sglang_rollout.GenerateState(args).tokenizer.encode(TOOL_SAYS, add_special_tokens=False)
    sample.append_response_tokens(args, tokens=told, trainable=False, text=TOOL_SAYS)
    sample.status = type(sample.status).PENDING  # the first turn's end is not the sample's
    longest = sample.response_length + SECOND_TURN  # slime counts what is there already
    return await sglang_rollout.generate(args, sample, {**sampling_params, "max_new_tokens": longest})
