"""The patches as files: their size, their form, and the command's refusals. Needs no slime."""

import re
import subprocess
import sys

import pytest

from slime_fipo.plugin.patch import PATCHES

from .conftest import BASES


def added_and_removed(text: str) -> dict[str, tuple[int, int]]:
    """Path -> lines added and removed."""
    counts = {}
    for part in re.split(r"^diff --git ", text, flags=re.MULTILINE)[1:]:
        path = part.split(" b/", 1)[1].splitlines()[0]
        body = [line for hunk in re.split(r"^@@ .*$", part, flags=re.MULTILINE)[1:] for line in hunk.splitlines()]
        body = [line for line in body if line != "-- "]  # git's signature follows the last hunk
        counts[path] = (sum(line[:1] == "+" for line in body), sum(line[:1] == "-" for line in body))
    return counts


@pytest.mark.parametrize("base", BASES)
def test_one_small_commit(base):
    [path] = (PATCHES / base).iterdir()
    text = path.read_text(encoding="utf-8")
    counts = added_and_removed(text)
    assert sum(added for name, (added, _) in counts.items() if name.startswith("slime/")) <= 150
    assert counts["tests/test_fipo_loss.py"][0] <= 130
    assert sum(removed for _, removed in counts.values()) <= 5
    assert {name for name in counts if name.startswith("docs/")} == {
        "docs/en/get_started/usage.md",
        "docs/zh/get_started/usage.md",
    }
    assert all(counts[name] == (1, 0) for name in counts if name.startswith("docs/"))


@pytest.mark.parametrize("base", BASES)
def test_a_mail_with_few_lines_of_slimes(base):
    """One line of context on either side of a hunk, as ``git format-patch -U1`` writes them, and who wrote it."""
    [path] = (PATCHES / base).iterdir()
    text = path.read_text(encoding="utf-8")
    assert re.search(r"^Subject: \[PATCH\] Add FIPO", text, re.MULTILINE)
    assert "\nCo-authored-by: SeungyounShin <" in text
    for hunk in re.split(r"^@@ .*$", text, flags=re.MULTILINE)[1:]:
        kinds = "".join(line[:1] for line in hunk.splitlines()[1:] if line[:1] in " +-")
        assert not re.search(r"   ", kinds)


def patch(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "slime_fipo.cli", "patch", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("command", ["apply", "revert", "check"])
def test_what_is_no_checkout_of_slime_is_refused(command, tmp_path):
    (tmp_path / "slime" / "utils").mkdir(parents=True)
    for path in (tmp_path / "missing", tmp_path):
        run = patch(command, "--slime-root", path)
        assert (run.returncode, run.stdout) == (2, "")
        assert run.stderr == f"slime-fipo patch: --slime-root {path} is not a git checkout of slime\n"
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    (tmp_path / "slime" / "utils" / "arguments.py").write_text("# another slime\n")
    run = patch(command, "--slime-root", tmp_path)
    assert run.returncode == 2
    assert run.stderr.startswith(f"slime-fipo patch: --slime-root {tmp_path} was not changed: ")
    assert run.stderr.count("\n") == 1
    assert (tmp_path / "slime" / "utils" / "arguments.py").read_text() == "# another slime\n"
