"""Where the embedded engine's random draws come from.

Every draw is seeded by (seed, purpose, place, stream), so a continued run draws what an undisturbed one would have, and
two arms of a study that share a seed draw the same at the same place.
"""

from __future__ import annotations

import numpy as np
import torch

ROLLOUT, EVAL, CONTROL = range(3)  # purposes


def seeded_generator(device: torch.device, *key: int) -> torch.Generator:
    """A torch generator whose stream depends on the whole key."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> 1  # numpy 1 has no uint64 >> int
    return torch.Generator(device).manual_seed(seed)
