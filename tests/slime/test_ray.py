"""From one word in the launch line to slime's loss in a Ray actor, through a real local cluster."""

import json

import pytest

from .conftest import python
from .test_parser import BATCH, FIPO, FLAGS, MODEL


def test_an_actor_in_another_process_runs_the_loss(slime, version, megatron, results, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    flags = [*FLAGS[: FLAGS.index("--actor-num-gpus-per-node")], "--eps-clip-high", "0.28", *BATCH, *FIPO]
    flags += ["--debug-train-only", "--hf-checkpoint", tmp_path, "--ref-load", tmp_path, "--use-rollout-logprobs"]
    run = python(
        ["-m", "slime_fipo", "tests/slime/ray_train.py", *flags], slime, megatron, PARSED=str(tmp_path / "out.json")
    )
    assert run.returncode == 0, run.stderr[-4000:]
    out = json.loads((tmp_path / "out.json").read_text())
    expected = results["cp1"]["cases"]["rollout_logprobs"]["fipo"]
    mismatch = {"fipo/mismatch_future_kl_abs", "fipo/mismatch_clip_frac"}
    for step, names in zip(out["steps"], (mismatch, set()), strict=True):
        assert step["pid"] != out["pid"]
        assert step["loss"] == pytest.approx(float(expected["loss"]), abs=1e-6)
        assert step["metrics"].keys() == expected["metrics"].keys() | names
        for name, value in expected["metrics"].items():
            assert step["metrics"][name] == pytest.approx(value, abs=1e-6), name
