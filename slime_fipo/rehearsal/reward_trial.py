"""A random model answers nothing right, so the rehearsal appends right answers and sees what the reward gives them.

Each reward is tried once, on a prompt that it is called for: the label in every form that data sets ask for. From then
on about half of the samples end in the right answer, in the form that the prompt asks for if the reward reads it, else
in one that it reads. The tokens stay the model's own: only what the reward reads is longer.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import re
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from .watch import described, record, reward_value

# Name -> how a response ends in a right answer. What a prompt has to contain to ask for it is below.
FORMS = {
    "Answer: …": "\n\nAnswer: {}",
    r"\boxed{…}": "\n\n\\boxed{{{}}}",
    "#### …": "\n#### {}",
    "<answer>…</answer>": "\n<answer>{}</answer>",
    r"</think> \boxed{…}": "\n</think>\n\n\\boxed{{{}}}",
    "… as it is": " {}",
}
_ASKED = {
    "Answer: …": re.compile(r"answer\s*[:：]", re.IGNORECASE),
    r"\boxed{…}": re.compile(r"\\boxed"),
    "#### …": re.compile(r"####"),
    "<answer>…</answer>": re.compile(r"<answer>", re.IGNORECASE),
}
_NOT_AWAITED = re.compile(r"can't be (?:used in 'await'|awaited)")


def plant_answers(rm_hub: ModuleType) -> None:
    """Wrap slime's two entries to a reward, ``async_rm`` and ``batched_async_rm``."""
    one, batch = rm_hub.async_rm, rm_hub.batched_async_rm
    trials: dict[str, asyncio.Task] = {}

    async def ask(args, samples: list, together: bool, **kwargs) -> list:
        if together:
            return await batch(args, samples, **kwargs)
        return [await one(args, sample, **kwargs) for sample in samples]

    async def rewarded(args, samples: list, together: bool, **kwargs) -> list:
        flat = [sample for each in samples for sample in (each if isinstance(each, list) else [each])]
        name = reward_name(args, flat[0]) if flat else ""
        if flat and name not in trials:
            trials[name] = asyncio.ensure_future(_tried(name, args, samples, together, ask, **kwargs))
        form = await asyncio.shield(trials[name]) if flat else None
        with _ending_right(flat, [form if _is_planted(args, sample) else None for sample in flat]):
            return await ask(args, samples, together, **kwargs)

    @functools.wraps(one)
    async def async_rm(args, sample, **kwargs):
        if _is_open(sample):  # called by batched_async_rm below
            return await one(args, sample, **kwargs)
        return (await rewarded(args, [sample], False, **kwargs))[0]

    @functools.wraps(batch)
    async def batched_async_rm(args, samples, **kwargs):
        return await rewarded(args, samples, True, **kwargs)

    rm_hub.async_rm, rm_hub.batched_async_rm = async_rm, batched_async_rm


def reward_name(args, sample) -> str:
    """The flag and value that choose a sample's reward, as slime does."""
    metadata = sample.metadata if isinstance(sample.metadata, dict) else {}
    path = sample.custom_rm_path or args.custom_rm_path
    return f"--custom-rm-path {path}" if path else f"--rm-type {metadata.get('rm_type') or args.rm_type}"


async def _tried(name: str, args, samples: list, together: bool, ask, **kwargs) -> str | None:
    """Record what the reward gives to each form; the form that samples get from now on, None if none is read."""
    first = samples[0][0] if isinstance(samples[0], list) else samples[0]
    asked = [form for form, pattern in _ASKED.items() if pattern.search(_text(first.prompt))]
    label = None if first.label is None else str(first.label)
    values, error = {}, None
    for form in ("", *(FORMS if label else ())):
        copies = copy.deepcopy(samples if together else [first])
        flat = [sample for each in copies for sample in (each if isinstance(each, list) else [each])]
        try:
            with _ending_right(flat, [form or None] * len(flat)):
                rewards = await ask(args, copies, together, **kwargs)
        except Exception as problem:
            error = f"raised {described(problem)}"
            if _NOT_AWAITED.search(str(problem)):
                error = f"is not async, and slime awaits it ({problem}); write async def"
            if not form:
                break
            continue
        reward = rewards[0][0] if isinstance(rewards[0], list) else rewards[0]
        error = error or _unfit(args, name, reward)
        values[form] = reward_value(args, reward)
    record("reward", name=name, label=label, asked=asked, values=values, error=error, prompt=_text(first.prompt)[-300:])
    return chosen_form(asked, values)


def _unfit(args, name: str, reward: Any) -> str | None:
    """What is wrong with a reward's type; slime itself stops later, at a place that does not say it."""
    if isinstance(reward, dict):
        flag, key = "--reward-key", args.reward_key
        if args.custom_rm_path and not name.endswith(f" {args.custom_rm_path}"):  # a benchmark's own
            flag, key = "--eval-reward-key", args.eval_reward_key or args.reward_key
        if key is None:
            return f"returned a dictionary, and {flag} is missing; name one of its keys: {', '.join(map(str, reward))}"
        if key not in reward:
            return f"returned a dictionary without {flag} {key}; it has {', '.join(map(str, reward)) or 'no keys'}"
        reward = reward[key]
    if isinstance(reward, bool | int | float) or hasattr(reward, "__float__"):
        return None
    return f"returned {reward!r:.80}; return a number, or a dictionary and name its key with --reward-key"


def chosen_form(asked: list[str], values: dict[str, float]) -> str | None:
    """A form that gives more than the response as it was: one that the prompt asks for, else the best."""
    plain = values.get("", float("nan"))
    read = [form for form, value in values.items() if form and value > plain]
    best = max((values[form] for form in read), default=None)
    return next((f for f in (*(f for f in asked if f in read), *(f for f in read if values[f] == best))), None)


def _is_planted(args, sample) -> bool:
    """Every second sample of a group. With dynamic sampling every third group has none or all, for it to drop."""
    index = sample.index or 0
    group = sample.group_index if sample.group_index is not None else index // args.n_samples_per_prompt
    if args.dynamic_sampling_filter_path is not None and group % 3 == 2:
        return group % 2 == 1
    return index % 2 == 1


_open: set[int] = set()


def _is_open(sample) -> bool:
    return id(sample) in _open


@contextmanager
def _ending_right(samples: list, forms: list[str | None]):
    """While the reward reads them, the samples end in their labels, each in its form; None leaves one as it is."""
    responses = [sample.response for sample in samples]
    ids = {id(sample) for sample in samples}
    _open.update(ids)
    try:
        for sample, form in zip(samples, forms, strict=True):
            if form is not None and sample.label is not None:
                sample.response = (sample.response or "") + FORMS[form].format(sample.label)
        yield
    finally:
        for sample, response in zip(samples, responses, strict=True):
            sample.response = response
        _open.difference_update(ids)


def _text(prompt: Any) -> str:
    """A prompt as slime holds it: text, or messages."""
    if isinstance(prompt, list):
        return "\n".join(_text(part) for part in prompt)
    if isinstance(prompt, dict):
        return _text(prompt.get("content", prompt.get("text", "")))
    return prompt if isinstance(prompt, str) else ""
