"""slime's built-in weights of recorded batches: ``python -m tests.patches.golden_rig IN OUT``, a patched slime on the
path."""

import sys
from argparse import Namespace

import torch
from slime.utils.ppo_utils import compute_fipo_weights

from slime_fipo.algorithm import FipoConfig

cases = torch.load(sys.argv[1], weights_only=True)
results = []
for case in cases:
    config = FipoConfig(**case["config"])
    args = Namespace(**{f"fipo_{name}": value for name, value in config.as_dict().items()})
    log_ratios = (case["log_probs"] - case["old_log_probs"]).float().split(case["lengths"])
    advantages, masks = (case[name].float().split(case["lengths"]) for name in ("advantages", "mask"))
    if args.fipo_safety_thresh is None:
        args.fipo_safety_thresh = float("inf")
    results.append(torch.cat(compute_fipo_weights(args, log_ratios, advantages, masks)))
torch.save(results, sys.argv[2])
