"""slime's own CPU tests of its loss, run with FIPO imported before them."""

import pytest

from .conftest import python

NAMES = (
    "policy_loss",
    "cispo_loss",
    "cp_utils",
    "logprob_response_spans",
    "loss_cp_invariance",
    "metric_report",
    "ppo_kl_metric",
    "ppo_logprob_entropy",
)
# The others put stand-ins for megatron into sys.modules, which the plugin's loss imports for real.
BESIDE_THE_LOSS = ("policy_loss", "cispo_loss", "ppo_logprob_entropy")


@pytest.mark.parametrize(
    ("plugin", "names"), [("slime_fipo.plugin.arguments", NAMES), ("slime_fipo.plugin.loss", BESIDE_THE_LOSS)]
)
def test_pass_after_our_import(slime, plugin, names, version):
    files = [path for name in names if (path := slime / "tests" / f"test_{name}.py").exists()]
    if not files:
        pytest.skip(f"slime {version} has none of these tests")
    run = python(
        ["-m", "pytest", "-q", "-p", plugin, "-p", "no:cacheprovider", *files],
        slime,
        cwd=slime,
        timeout=1200,
        TORCHDYNAMO_DISABLE="1",  # their numbers do not depend on it, and compiling takes minutes
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]
    assert " passed" in run.stdout and " failed" not in run.stdout and " error" not in run.stdout
