"""The patches on real slime: they apply, nothing else of slime changes, and what is built in equals the plugin."""

import filecmp
import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from slime_fipo.plugin import patch
from tests.slime.test_loss import assert_same
from tests.slime.test_parser import BATCH, ERRORS, FIPO, FLAGS, MODEL, ONE_STEP, SCRIPT, TRAIN_FROM_ROLLOUT, YAML

from .conftest import git, python
from .test_series import generator

pytestmark = pytest.mark.slime


def hashes(root: Path) -> dict:
    files = (path for path in root.rglob("*") if path.is_file() and ".git" not in path.relative_to(root).parts)
    return {str(p.relative_to(root)): (p.stat().st_mode, hashlib.sha256(p.read_bytes()).digest()) for p in files}


def test_rebuilding_gives_the_same_bytes(slime_clone, base, tmp_path):
    generator().build(slime_clone, tmp_path)
    made = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert len(made) == 1 + sum(len(series.patches) for series in patch.all_series())
    _, differ, missing = filecmp.cmpfiles(tmp_path, patch.PATCHES, made, shallow=False)
    assert (differ, missing) == ([], []), "python patches/build.py --slime-root PATH makes them anew"


def test_git_am_gives_the_files_that_series_json_names(series, base, patched):
    commits = git(patched, "rev-list", "--reverse", f"{series.commit}..HEAD").split()
    assert [git(patched, "rev-parse", f"{commit}^{{tree}}").strip() for commit in commits] == series.results
    assert git(patched, "status", "--porcelain") == ""
    assert git(base, "rev-parse", "HEAD^{tree}").strip() == series.tree


def test_the_example_is_separable(series, base, tmp_path):
    git(base, "worktree", "add", "--quiet", "--detach", tmp_path / "slime")
    git(tmp_path / "slime", "am", "--quiet", *series.paths[:-1])
    assert git(tmp_path / "slime", "rev-parse", "HEAD^{tree}").strip() == series.results[-2]
    last = git(tmp_path / "slime", "apply", "--numstat", series.paths[-1]).splitlines()
    assert [line.split("\t")[2] for line in last] == ["scripts/run-qwen3.5-2B-fipo.sh"]
    git(base, "worktree", "remove", "--force", tmp_path / "slime")


def test_apply_and_revert(series, base, patched):
    before = hashes(base)
    patch.apply(base)
    assert hashes(base) == hashes(patched)
    patch.revert(base)
    assert hashes(base) == before
    assert git(base, "status", "--porcelain", "--ignored") == ""


def test_slimes_generator_makes_the_workflow(patched):
    run = python([".github/workflows/generate_github_workflows.py"], patched, cwd=patched)
    assert run.returncode == 0, run.stderr
    assert git(patched, "status", "--porcelain") == ""
    assert "test_fipo_loss.py" in (patched / ".github/workflows/pr-test.yml").read_text()


@pytest.mark.parametrize("cp_size", [1, 2])
def test_equals_the_plugin(patched, version, tmp_path, cp_size):
    """Loss, gradient and every metric, in every combination with slime's own features that the plugin is tested in."""
    run = python(["-m", "tests.patches.rig", version, tmp_path / "out.pt", cp_size, "fipo"], patched)
    assert run.returncode == 0, run.stderr[-4000:]
    results = torch.load(tmp_path / "out.pt", weights_only=True)
    assert {"everything_tis", "everything_rollout_logprobs", "trained_tokens", "no_response"} <= results.keys()
    assert "fipo/mismatch_future_kl_abs" in results["first_step"]["built in"]["metrics"]
    for name, case in results.items():
        assert case["built in"]["metrics"].keys() == case["plugin"]["metrics"].keys(), name
        assert_same(case["built in"], case["plugin"], 1e-6, name)
        if name != "chunked":  # the plugin's other implementation
            assert torch.equal(case["built in"]["loss"], case["plugin"]["loss"]), name
            assert torch.equal(case["built in"]["gradient"], case["plugin"]["gradient"]), name


@pytest.mark.parametrize("cp_size", [1, 2])
def test_policy_loss_is_bitwise_unchanged(base, patched, version, tmp_path, cp_size):
    results = []
    for tree in (base, patched):
        out = tmp_path / f"{tree.parent.name}.pt"
        run = python(["-m", "tests.patches.rig", version, out, cp_size, "policy_loss"], tree)
        assert run.returncode == 0, run.stderr[-4000:]
        results.append(torch.load(out, weights_only=True))
    assert results[0].keys() == results[1].keys() and len(results[0]) >= 20
    for name, expected in results[0].items():
        actual = results[1][name]
        assert torch.equal(actual["loss"], expected["loss"]) and torch.equal(actual["gradient"], expected["gradient"])
        assert actual["metrics"] == expected["metrics"], name


def test_passes_by_slimes_own_way_of_running_tests(patched):
    run = python(["tests/test_fipo_loss.py"], patched, cwd=patched)
    assert run.returncode == 0, run.stdout[-4000:]
    assert " passed" in run.stdout


BATCH_LAYOUT = "slime/backends/megatron_utils/fipo.py"
FEATURES = {
    "shift from train": (
        'log_ratio + torch.cat(batch["rollout_log_probs"]) - torch.cat(batch["log_probs"])',
        "log_ratio * 7 + 3",
    ),
    "mismatch metrics": ("if args.fipo_step_id == 0 and", "if False and"),
    "mismatch metrics at every step": ("if args.fipo_step_id == 0 and", "if"),
    "log-ratio": ("-ppo_kl.detach()", "-ppo_kl.detach() + 0.1"),
}


def mutations(series: patch.Series, tree: Path) -> dict[str, tuple[str, str]]:
    """Each hook into slime's code taken back by itself, and features of the added module broken."""
    mutated = {}
    for hook in generator().OBJECTIVE:
        if series.name in hook.bases and "Choose loss type" not in hook.text:  # help is for people
            text = (tree / hook.path).read_text()
            changed = hook.text if hook.replace else hook.anchor + hook.text
            assert text.count(changed) == 1
            mutated[f"without {hook.text.strip()}"] = (hook.path, text.replace(changed, hook.anchor))
    text = (tree / BATCH_LAYOUT).read_text()
    for name, (old, new) in FEATURES.items():
        assert text.count(old) == 1, name
        mutated[name] = (BATCH_LAYOUT, text.replace(old, new))
    return mutated


def test_slimes_new_tests_notice_every_missing_line(series, patched, tmp_path):
    shutil.copytree(patched, tmp_path / "slime", symlinks=True)
    (tmp_path / "in.json").write_text(json.dumps(mutations(series, patched)))
    arguments = ["-m", "tests.patches.mutation_rig", tmp_path / "slime", tmp_path / "in.json", tmp_path / "out.json"]
    run = python(arguments, timeout=540)
    assert run.returncode == 0, run.stderr[-4000:]
    results = json.loads((tmp_path / "out.json").read_text())
    unchanged = results.pop("")
    assert unchanged["status"] == pytest.ExitCode.OK, unchanged["output"][-4000:]
    statuses = {name: result["status"] for name, result in results.items()}
    assert len(statuses) >= 14
    assert statuses == dict.fromkeys(statuses, pytest.ExitCode.TESTS_FAILED)


# Of the plugin alone: flags that upstream has no use for, and its look at sys.argv and its launcher's arrangements.
NOT_UPSTREAM = {"chunk_size", "misspelt", "yaml_misspelt", "negated_without_the_loss", "custom_loss_function"}
NOT_UPSTREAM |= {"custom_tis", "lacking_slime"}
MISMATCH = ["--get-mismatch-metrics", "--custom-tis-function-path", "my.tis"]
SAME = {
    "fipo": [*BATCH, *FIPO],
    "preset": [*BATCH, *FIPO, "--fipo-preset", "32b", "--fipo-decay-rate=64", "--fipo-log-detail"],
    "unclipped": [*BATCH, *FIPO, "--fipo-unclipped"],
    "num_steps": ["--num-steps-per-rollout", "4", *FIPO],
    "stale": [*ONE_STEP, *FIPO, "--fipo-allow-single-step", "--use-rollout-logprobs"],
    "old_actor": [*ONE_STEP, *FIPO, "--fipo-allow-single-step", "--keep-old-actor"],
    "own_mismatch": [*BATCH, *TRAIN_FROM_ROLLOUT, *MISMATCH],
    "same_c": [*BATCH, *FIPO, "--eps-clip-c", "3", "--fipo-dual-clip-c", "3"],
    "off": [*BATCH, *FIPO, "--fipo-dual-clip-c", "none", "--fipo-safety-thresh", "none"],
    "yaml": [*BATCH, *FIPO, "--custom-config-path", "fipo.yaml"],
}


@pytest.fixture(scope="session")
def parsed(base, patched, megatron, tmp_path_factory):
    """slime's real parser: the patched one, and the unpatched one alone and under the plugin's launcher."""
    tmp_path = tmp_path_factory.mktemp("parser")
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    for name, text in YAML.items():
        (tmp_path / name).write_text(text)
    common = [*FLAGS, "--debug-train-only", "--hf-checkpoint", str(tmp_path), "--ref-load", str(tmp_path)]

    def runs(wrapper, flags):
        at = {name: [str(tmp_path / f) if f.endswith(".yaml") else f for f in given] for name, given in flags.items()}
        return {n: {"wrapper": wrapper, "script": SCRIPT, "arguments": [*common, *given]} for n, given in at.items()}

    errors = {name: flags for name, (flags, _) in ERRORS.items() if name not in NOT_UPSTREAM}
    errors["cispo"] = [*BATCH, *FIPO, "--advantage-estimator", "cispo"]
    errors["from_train"] = [*BATCH, *TRAIN_FROM_ROLLOUT]
    plain = {"policy_loss": BATCH}
    results = {}
    for name, tree, cases in (
        ("built in", patched, {**runs(False, SAME), **runs(False, errors), **runs(False, plain)}),
        ("plugin", base, {**runs(True, SAME), **runs(False, plain)}),
    ):
        (tmp_path / "cases.json").write_text(json.dumps(cases))
        arguments = ["-m", "tests.slime.parser_rig", tmp_path / "cases.json", tmp_path / "out.json"]
        run = python(arguments, tree, megatron, timeout=540)
        assert run.returncode == 0, run.stderr[-4000:]
        results[name] = json.loads((tmp_path / "out.json").read_text())
    return results


def test_settings_reach_the_namespace_as_with_the_plugin(parsed):
    for name in SAME:
        plugin, built_in = parsed["plugin"][name], parsed["built in"][name]
        assert (plugin["status"], built_in["status"]) == (0, 0), built_in["output"][-2000:]
        plugin, built_in = plugin["namespace"], built_in["namespace"]
        assert built_in["loss_type"] == "'fipo_loss'"
        c = built_in["fipo_dual_clip_c"]
        assert built_in["eps_clip_c"] == ("None" if c == "'none'" else c)
        internal = ("fipo_impl", "fipo_chunk_size", "fipo_chained_hook_path")
        settings = {key: value for key, value in plugin.items() if key.startswith("fipo_") and key not in internal}
        assert settings == {key: value for key, value in built_in.items() if key.startswith("fipo_")}, name


def test_policy_loss_namespace_gains_unset_settings_only(parsed):
    before, after = parsed["plugin"]["policy_loss"]["namespace"], parsed["built in"]["policy_loss"]["namespace"]
    new = after.keys() - before.keys()
    assert new and all(name.startswith("fipo_") and after[name] == "None" for name in new)
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize("name", [*sorted(ERRORS.keys() - NOT_UPSTREAM), "cispo", "from_train"])
def test_mistakes_are_refused_as_by_the_plugin(parsed, name):
    run = parsed["built in"][name]
    assert run["status"] != 0 and run["namespace"] is None
    mismatch = "--get-mismatch-metrics"  # the launcher turns it on by itself
    others = {"cispo": "--advantage-estimator cispo", "from_train": mismatch, "single_step_from_train": mismatch}
    assert (others.get(name) or ERRORS[name][1]) in run["output"].strip().splitlines()[-1]


def test_example_script_says_what_it_would_run(patched, tmp_path):
    """The launch script up to ray, with stand-ins on PATH that record their arguments; then slime's own array."""
    (tmp_path / "ray").write_text('#!/bin/bash\nprintf "%s\\n" "$@" >>"$RECORD"\n')
    (tmp_path / "ray").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "RECORD": str(tmp_path / "record")}
    script = patched / "scripts/run-qwen3.5-2B-fipo.sh"
    subprocess.run(["bash", script], env=environment, check=True, capture_output=True, cwd=tmp_path)
    words = (tmp_path / "record").read_text().splitlines()
    assert words[words.index("--loss-type") + 1] == "fipo_loss"
    assert words[words.index("--hidden-size") + 1] == "2048"
    command = words[words.index("python3") + 1 :]
    assert Path(command[0]).resolve() == patched / "train.py"
