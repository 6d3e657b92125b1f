"""The loop on slime v0.3.1, which has no accelerator interface: its own CUDA calls are answered as Megatron's are.

v0.3.0 does not get that far; docs/rehearsal.md says where it stops.
"""

from .conftest import checkout
from .test_loop import DEVIATION, DIFFERENCE, DISK, SGLANG_LOG_PROBS


def test_v0_3_1_trains(loop, slime_root):
    older = loop.on(checkout(slime_root, "v0.3.1", loop.folder / "slime-v0.3.1"))
    run = older("v0.3.1", 2, older.slime / "train.py", *SGLANG_LOG_PROBS, *DISK)
    assert list(run.steps(DEVIATION)) == list(range(6))
    assert max(run.first_steps(DIFFERENCE)) < 0.01
    assert all(value > 0 for value in run.later_steps(DEVIATION))
