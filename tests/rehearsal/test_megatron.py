"""The stand-ins for Megatron-LM against the real megatron-core: its distributed optimizer, and packed attention."""

import json
import os
import subprocess
import sys

from .test_site import REPOSITORY, SITE


def rig(name: str, argument, *, rehearsal: bool) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (SITE, REPOSITORY))),
        "PYTHONWARNINGS": "ignore",
    }
    environment |= {"SLIME_FIPO_REHEARSAL": "/nowhere"} if rehearsal else {}
    command = [sys.executable, "-m", f"tests.rehearsal.{name}", str(argument)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=REPOSITORY, timeout=600)


def test_an_optimizer_that_was_saved_and_loaded_goes_on_as_if_nothing_had_happened(tmp_path):
    run = rig("optimizer_rig", tmp_path / "out.json", rehearsal=True)
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "out.json").read_text())
    assert results.keys() == {"dp_reshardable", "dp_zero_gather_scatter"}
    for undisturbed, resumed in results.values():
        assert undisturbed["steps"] == [6, 6, 6]
        assert resumed == undisturbed


def test_packed_attention_is_exact_at_any_context_parallel_size(tmp_path):
    run = rig("attention_rig", tmp_path, rehearsal=False)
    assert run.returncode == 0, run.stderr
    results = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert results.keys() == {"cp1-0", "cp2-0", "cp2-1"}
    for differences in results.values():
        assert len(differences) == 4  # output, and the gradients of query, key and value
        assert max(differences) < 1e-6  # gradients are summed over ranks in float32


def test_tensor_parallel_ranks_have_the_logits_and_gradients_of_one(tmp_path):
    run = rig("sequence_parallel_rig", tmp_path, rehearsal=True)
    assert run.returncode == 0, run.stderr
    results = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert results.keys() == {"sp0-0", "sp0-1", "sp1-0", "sp1-1"}
    for differences in results.values():
        assert len(differences) == 19  # logits, and each parameter's gradient
        assert max(differences.values()) < 1e-5
