"""The patches on real slime: they apply and revert, equal the plugin, and leave everything else as it was."""

import ast
import contextlib
import difflib
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from slime_fipo.check.slime_parser import run_parser
from tests.algorithm.test_golden import CASES as GOLDEN
from tests.algorithm.test_golden import GoldenCase
from tests.slime.test_loss import assert_same
from tests.slime.test_parser import BATCH, FIPO, FLAGS, MODEL

from .conftest import git, python
from .test_series import patch

pytestmark = pytest.mark.slime


def hashes(root: Path) -> dict:
    files = (path for path in root.rglob("*") if path.is_file() and ".git" not in path.relative_to(root).parts)
    return {str(p.relative_to(root)): (p.stat().st_mode, hashlib.sha256(p.read_bytes()).digest()) for p in files}


@pytest.fixture
def checkout(base, tmp_path):
    git(base, "clone", "--quiet", "--shared", base, tmp_path / "slime")
    return tmp_path / "slime"


def test_apply_and_revert(checkout, patched, series):
    before = hashes(checkout)
    assert patch("check", "--slime-root", checkout).stdout == f"{series.name} fits {checkout}\n"
    assert patch("revert", "--slime-root", checkout).returncode == 2
    assert hashes(checkout) == before
    assert patch("apply", "--slime-root", checkout).stdout == f"applied {series.name}: {checkout}\n"
    assert hashes(checkout) == hashes(patched)
    again = patch("apply", "--slime-root", checkout)
    assert (again.returncode, "FIPO is built in already" in again.stderr) == (2, True)
    assert patch("revert", "--slime-root", checkout).returncode == 0
    assert hashes(checkout) == before


def test_beside_a_users_own_work(checkout):
    """A commit ahead of the base, an unrelated edit, and an edit elsewhere in a file that the patch touches."""
    loss = checkout / "slime/backends/megatron_utils/loss.py"
    loss.write_text("# a commit of mine\n" + loss.read_text())
    git(checkout, "commit", "--quiet", "--all", "--message", "mine")
    (checkout / "README.md").write_text("an edit of mine\n")
    before = hashes(checkout)
    assert patch("apply", "--slime-root", checkout).returncode == 0
    assert (checkout / "README.md").read_text() == "an edit of mine\n"
    loss.write_text(loss.read_text() + "# another\n")
    assert patch("revert", "--slime-root", checkout).returncode == 0
    assert loss.read_text().endswith("# another\n")
    loss.write_text(loss.read_text().removesuffix("# another\n"))
    assert hashes(checkout) == before


def test_nothing_is_half_applied(checkout):
    """The last file that the patch touches is in the way."""
    (checkout / "tests/test_fipo_loss.py").write_text("a test of mine\n")
    before = hashes(checkout)
    run = patch("apply", "--slime-root", checkout)
    assert run.returncode == 2
    assert hashes(checkout) == before


def test_slimes_generator_makes_the_workflow(patched):
    run = python([".github/workflows/generate_github_workflows.py"], patched, cwd=patched)
    assert run.returncode == 0, run.stderr
    assert git(patched, "status", "--porcelain") == ""


def test_the_authors_numbers(patched, tmp_path):
    """compute_fipo_weights on the recorded cases whose settings are built in: weights within 2e-5, the same drops."""
    cases = []
    for name in GOLDEN:
        case = GoldenCase(name)
        config = {"max_dual_clipped_tokens": 1, "clip_influence": True, "dual_clip_c": 10.0, **case.config}
        if config["clip_influence"] and config["dual_clip_c"] and config["max_dual_clipped_tokens"] == 1:
            keys = ("log_probs", "old_log_probs", "advantages", "mask", "final_mask", "influence_weights")
            cases.append({"config": case.config, "lengths": case.lengths, **{key: case.packed(key) for key in keys}})
    assert len(cases) >= 5
    torch.save(cases, tmp_path / "in.pt")
    run = python(["-m", "tests.patches.golden_rig", tmp_path / "in.pt", tmp_path / "out.pt"], patched)
    assert run.returncode == 0, run.stderr[-4000:]
    for case, result in zip(cases, torch.load(tmp_path / "out.pt", weights_only=True), strict=True):
        weight, _, keep = result.unbind(-1)
        mask, final_mask = case["mask"].bool(), case["final_mask"].bool()
        assert (weight - case["influence_weights"])[final_mask].abs().max() < 2e-5
        assert torch.equal((keep > 0) & mask, final_mask)


@pytest.mark.parametrize("cp_size", [1, 2])
def test_equals_the_plugin(patched, version, tmp_path, cp_size):
    """Loss, gradient and shared metrics, in every combination with slime's own features."""
    run = python(["-m", "tests.patches.rig", version, tmp_path / "out.pt", cp_size, "fipo"], patched)
    assert run.returncode == 0, run.stderr[-4000:]
    results = torch.load(tmp_path / "out.pt", weights_only=True)
    assert {"everything_tis", "allgather_cp", "preset_7b", "preset_32b", "no_response"} <= results.keys()
    shared = {"fipo_weight": "fipo/influence_weight", "fipo_future_kl": "fipo/future_kl"}
    shared["fipo_dropfrac"] = "fipo/dropped_frac"
    for name, case in results.items():
        built_in, plugin = case["built in"], case["plugin"]
        for mine, theirs in shared.items():
            built_in["metrics"][theirs] = built_in["metrics"].pop(mine)
        assert 0 <= built_in["metrics"].pop("fipo_clipfrac") <= 1
        plugin["metrics"] = {key: plugin["metrics"][key] for key in built_in["metrics"]}
        assert_same(built_in, plugin, 1e-6, name)


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
    assert "3 passed" in run.stdout


def meaning(source: str) -> str:
    """The program without its texts: docstrings, messages and help are for people."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
    return ast.dump(tree)


# Lines that no result depends on: texts, argparse's own default, and the graph that autograd would build for nothing.
WITHOUT_EFFECT = ("help=", "default=False,", "@torch.no_grad()")


def mutations(base: Path, patched: Path) -> dict[str, tuple[str, str]]:
    """Each hunk of the patch taken back, and each added line that can be left out by itself."""
    mutated = {}
    for path in git(patched, "diff", "--name-only", "HEAD~", "--", "slime").split():
        old, new = (base / path).read_text().splitlines(), (patched / path).read_text().splitlines()
        without = {}
        matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
        for kind, old_start, old_stop, start, stop in matcher.get_opcodes():
            if kind == "equal":
                continue
            without[f"{path}:{start + 1}-{stop}"] = [*new[:start], *old[old_start:old_stop], *new[stop:]]
            for n in range(start, stop) if kind == "insert" else ():
                if not new[n].strip().startswith(WITHOUT_EFFECT):
                    without[f"{path}:{n + 1} {new[n].strip()}"] = [*new[:n], *new[n + 1 :]]
        for name, lines in without.items():
            text = "\n".join(lines) + "\n"
            with contextlib.suppress(SyntaxError):
                if meaning(text) != meaning("\n".join(new)):
                    mutated[name] = (path, text)
    return mutated


def test_slimes_new_tests_notice_every_missing_line(base, patched, tmp_path):
    shutil.copytree(patched, tmp_path / "slime", symlinks=True)
    (tmp_path / "in.json").write_text(json.dumps(mutations(base, patched)))
    arguments = ["-m", "tests.patches.mutation_rig", tmp_path / "slime", tmp_path / "in.json", tmp_path / "out.json"]
    run = python(arguments, timeout=1800)
    assert run.returncode == 0, run.stderr[-4000:]
    results = json.loads((tmp_path / "out.json").read_text())
    unchanged = results.pop("")
    assert unchanged["status"] == pytest.ExitCode.OK, unchanged["output"][-4000:]
    assert len(results) >= 60
    unnoticed = [name for name, result in results.items() if result["status"] == pytest.ExitCode.OK]
    assert unnoticed == []


@pytest.fixture(scope="session")
def parsed(base, patched, megatron, tmp_path_factory):
    """slime's real parser: patched alone, patched under the plugin's launcher, and as it was."""
    tmp_path = tmp_path_factory.mktemp("parser")
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    common = [*FLAGS, "--debug-train-only", "--hf-checkpoint", str(tmp_path), "--ref-load", str(tmp_path), *BATCH]

    def run(wrapper, *flags):
        return {"wrapper": wrapper, "arguments": [*common, *flags]}

    runs = {"policy_loss": run(False), "fipo": run(False, *FIPO), "launcher": run(True, *FIPO)}
    results = {}
    for name, tree in (("base", base), ("patched", patched)):
        results[name] = run_parser(runs, [tree, megatron], time_limit=540)["cases"]
    return results


def test_the_parser(parsed):
    before, after = parsed["base"]["policy_loss"]["namespace"], parsed["patched"]["policy_loss"]["namespace"]
    assert len(after.keys() - before.keys()) == 6
    assert {name: after[name] for name in before} == before
    assert parsed["patched"]["fipo"]["namespace"]["loss_type"] == "'fipo_loss'"


def test_the_launcher_refuses_a_patched_slime(parsed):
    run = parsed["patched"]["launcher"]
    assert run["status"] == 2
    assert "this slime has fipo_loss built in" in run["output"].strip().splitlines()[-1]
