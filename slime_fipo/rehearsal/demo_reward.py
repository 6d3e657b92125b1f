"""The sums' reward for slime's ``--custom-rm-path``; the embedded engine's own is ``local/rollout.py``'s."""

from __future__ import annotations

from argparse import Namespace

END_TEXT = "<end>"  # as SGLang shows the end-of-response token


async def sums_reward(args: Namespace, sample, **kwargs) -> float:
    """1 if the response ended by itself and what follows its last ``;`` is the label, else 0."""
    answer = sample.response.removesuffix(END_TEXT).strip().rsplit(";", 1)[-1]
    return float(sample.status is type(sample.status).COMPLETED and answer == str(sample.label))
