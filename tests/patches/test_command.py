"""``slime-fipo patch`` on a small git checkout of slime's shape, made here: what it writes, refuses and repairs."""

import fcntl
import json
import os
import shutil
import signal
import stat
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from slime_fipo.plugin import patch

BASE = {
    "train.py": b"from slime.utils.arguments import parse_args\n",
    "slime/utils/arguments.py": b"".join(b"line %d\n" % i for i in range(30)),
    "slime/utils/loss.py": b"one\r\ntwo\r\nthree\r\n",  # line endings are bytes too
    "scripts/run.sh": b"#!/bin/bash\necho no newline at the end",
    ".gitignore": b"*.log\n",
}
PATCHED = {
    1: {
        "slime/utils/arguments.py": BASE["slime/utils/arguments.py"].replace(b"line 7\n", b"line 7\nline 7.5\n"),
        "slime/utils/fipo.py": "γ = 2 ** (-1 / τ)\n".encode(),
    },
    2: {
        "slime/utils/arguments.py": BASE["slime/utils/arguments.py"]
        .replace(b"line 7\n", b"line 7\nline 7.5\n")
        .replace(b"line 20\n", b"line twenty\n"),
        "scripts/run.sh": b"#!/bin/bash\necho patched",
        "slime/utils/loss.py": b"one\r\n2\r\nthree\r\n",
    },
}
AFTER = {**BASE, **PATCHED[1], **PATCHED[2]}


def git(root, *arguments):
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.invalid", "-c", "core.autocrlf=false")
    return subprocess.run(["git", *identity, *arguments], cwd=root, check=True, capture_output=True, text=True).stdout


def write(root, files):
    for path, data in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)


@pytest.fixture(scope="session")
def origin(tmp_path_factory):
    """A repository like slime's with one base, and the folder of patches for it."""
    root, patches = tmp_path_factory.mktemp("origin"), tmp_path_factory.mktemp("patches")
    git(root, "init", "--quiet")
    write(root, BASE)
    (root / "scripts/run.sh").chmod(0o755)

    def commit(message):
        git(root, "add", "--all")
        git(root, "commit", "--quiet", "--message", message)
        return git(root, "rev-parse", "HEAD^{tree}").strip()

    tree = commit("base")
    base = git(root, "rev-parse", "HEAD").strip()
    results = []
    for number, files in PATCHED.items():
        write(root, files)
        results.append(commit(f"patch {number}"))
    git(root, "format-patch", "--quiet", "--unified=1", f"--output-directory={patches / 'fake'}", base)
    files = {}
    for line in git(root, "diff", "--raw", "--no-abbrev", base, "HEAD").splitlines():
        meta, path = line.split("\t")
        _, mode, before, after, _ = meta.split()
        files[path] = {"before": before if before.strip("0") else None, "after": after, "mode": mode}
    names = sorted(path.name for path in (patches / "fake").iterdir())
    series = {"commit": base, "describe": "fake", "tree": tree, "results": results, "patches": names, "files": files}
    (patches / "series.json").write_text(json.dumps({"fake": series}))
    return root, patches, base


@pytest.fixture
def checkout(origin, tmp_path, monkeypatch):
    root, patches, base = origin
    monkeypatch.setattr(patch, "PATCHES", patches)
    git(tmp_path, "clone", "--quiet", str(root), "slime")
    git(tmp_path / "slime", "checkout", "--quiet", base)
    return tmp_path / "slime"


def snapshot(root):
    """Every file's and folder's kind, mode, owner and bytes, git's own folder left out."""
    found = {}
    for path in sorted(root.rglob("*")):
        if ".git" in path.relative_to(root).parts:
            continue
        state = path.lstat()
        data = path.read_bytes() if stat.S_ISREG(state.st_mode) else b""
        found[str(path.relative_to(root))] = (stat.S_IMODE(state.st_mode), state.st_uid, state.st_gid, data)
    return found


def contents(root):
    return {path: data for path, (*_, data) in snapshot(root).items() if (root / path).is_file()}


def refuses(root, *words, actions=(patch.check, patch.apply, patch.revert)):
    before = snapshot(root) if root.is_dir() else None
    for action in actions:
        with pytest.raises(patch.Refusal) as refusal:
            action(root)
        message = str(refusal.value)
        assert "\n" not in message
        for word in words:
            assert word in message, f"{action.__name__}: {message}"
        assert before is None or snapshot(root) == before


def test_apply_then_revert_leaves_every_byte_as_before(checkout):
    write(checkout, {"notes.txt": b"mine, untracked\n", "run.log": b"mine, ignored\n"})
    before = snapshot(checkout)
    index = (checkout / ".git/index").read_bytes()

    assert "unpatched and clean" in patch.check(checkout)
    assert "4 files" in patch.apply(checkout)
    assert contents(checkout) == AFTER | {"notes.txt": b"mine, untracked\n", "run.log": b"mine, ignored\n"}
    assert os.access(checkout / "scripts/run.sh", os.X_OK)
    assert "with FIPO built in" in patch.check(checkout)
    assert "nothing to do" in patch.apply(checkout)
    assert "as before" in patch.revert(checkout)

    assert snapshot(checkout) == before
    assert (checkout / ".git/index").read_bytes() == index
    assert git(checkout, "status", "--porcelain") == "?? notes.txt\n"
    assert "nothing to do" in patch.revert(checkout)
    assert not list((checkout / ".git").glob("slime-fipo*"))


def test_a_worktree_and_a_rebuilt_history_are_the_same_slime(checkout, tmp_path):
    git(checkout, "worktree", "add", "--quiet", str(tmp_path / "second"), "HEAD")
    patch.apply(tmp_path / "second")
    assert contents(tmp_path / "second").keys() >= AFTER.keys()
    assert "unpatched" in patch.check(checkout)

    shutil.rmtree(checkout / ".git")
    git(checkout, "init", "--quiet")
    git(checkout, "add", "--all")
    git(checkout, "commit", "--quiet", "--message", "vendored")
    patch.apply(checkout)
    assert contents(checkout) == AFTER


def test_no_folder_no_slime_no_git(checkout, tmp_path):
    refuses(tmp_path / "missing", "is no folder")
    (tmp_path / "empty").mkdir()
    refuses(tmp_path / "empty", "is no slime checkout")
    refuses(checkout / "slime", "is no slime checkout")
    shutil.rmtree(checkout / ".git")
    refuses(checkout, "is no git checkout", "plugin")


def test_unknown_commit_says_what_was_found_and_what_works(checkout):
    git(checkout, "tag", "v9.9")
    write(checkout, {"train.py": b"another\n"})
    git(checkout, "commit", "--quiet", "--all", "--message", "another")
    head = git(checkout, "rev-parse", "--short=12", "HEAD").strip()
    refuses(checkout, head, "v9.9-1-g", "fake", "worktree add")


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("path", ["train.py", "slime/utils/arguments.py"])
def test_changed_files_are_left_alone(checkout, path, staged):
    with (checkout / path).open("ab") as file:
        file.write(b"mine\n")
    if staged:
        git(checkout, "add", path)
    refuses(checkout, path, "git stash", actions=(patch.check, patch.apply))


def test_an_edit_that_git_does_not_show_is_seen(checkout):
    git(checkout, "update-index", "--assume-unchanged", "slime/utils/loss.py")
    (checkout / "slime/utils/loss.py").write_bytes(b"mine\n")
    assert git(checkout, "status", "--porcelain") == ""
    refuses(checkout, "slime/utils/loss.py", actions=(patch.check, patch.apply))


@pytest.mark.parametrize("kind", ["file", "link", "folder"])
def test_what_lies_where_a_file_is_to_be_added(checkout, tmp_path, kind):
    target = checkout / "slime/utils/fipo.py"
    if kind == "file":
        target.write_bytes(b"mine\n")
    elif kind == "link":
        (tmp_path / "elsewhere").write_bytes(b"mine\n")
        target.symlink_to(tmp_path / "elsewhere")
    else:
        target.mkdir()
    refuses(checkout, "slime/utils/fipo.py", "git stash", actions=(patch.check, patch.apply))
    assert kind != "link" or (tmp_path / "elsewhere").read_bytes() == b"mine\n"


def test_a_linked_folder_is_not_followed(checkout, tmp_path):
    shutil.copytree(checkout / "scripts", tmp_path / "scripts")
    shutil.rmtree(checkout / "scripts")
    (checkout / "scripts").symlink_to(tmp_path / "scripts")
    refuses(checkout, "git stash", actions=(patch.check, patch.apply))


def test_half_patched_by_git_apply_or_by_hand(checkout, origin):
    git(checkout, "apply", str(next((origin[1] / "fake").glob("0001*"))))
    refuses(checkout, "half patched", "checkout HEAD --")
    git(checkout, "checkout", "--quiet", "--", ".")
    (checkout / "slime/utils/fipo.py").unlink()

    patch.apply(checkout)
    git(checkout, "checkout", "--quiet", "--", "slime/utils/loss.py")
    refuses(checkout, "half patched", "slime/utils/loss.py is not")


def test_patches_that_git_am_committed(checkout, origin):
    patches = sorted((origin[1] / "fake").iterdir())
    git(checkout, "am", "--quiet", "--keep-cr", str(patches[0]))
    refuses(checkout, "1 of the 2", "as commits")
    git(checkout, "am", "--quiet", "--keep-cr", str(patches[1]))
    assert "as commits" in patch.check(checkout) and "nothing to do" in patch.apply(checkout)
    refuses(checkout, "2 of the 2", "checkout", actions=(patch.revert,))


def test_what_git_apply_wrote_can_be_reverted(checkout, origin):
    before = snapshot(checkout)
    git(checkout, "apply", *map(str, sorted((origin[1] / "fake").iterdir())))
    patch.revert(checkout)
    assert snapshot(checkout) == before


def test_an_edit_of_the_users_is_not_reverted(checkout):
    patch.apply(checkout)
    (checkout / "slime/utils/fipo.py").write_bytes(b"mine\n")
    refuses(checkout, "half patched")
    for path in AFTER:
        if path != ".gitignore":
            (checkout / path).write_bytes(b"mine\n")
    refuses(checkout, "neither", actions=(patch.revert,))


def test_a_staged_patch_is_not_reverted(checkout):
    patch.apply(checkout)
    git(checkout, "add", "--all")
    refuses(checkout, "staged", "restore --staged", actions=(patch.revert,))
    git(checkout, "restore", "--staged", ".")
    patch.revert(checkout)
    assert git(checkout, "status", "--porcelain") == ""


@pytest.mark.parametrize("folder", [".", "slime/utils", ".git"])
def test_no_write_permission(checkout, folder):
    """In a child, as another user if this one may write everywhere."""
    before = snapshot(checkout)
    (checkout / folder).chmod(0o555)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                for path in (checkout, *checkout.rglob("*")):
                    os.chown(path, 65534, 65534, follow_symlinks=False)
                for path in (*checkout.parents[:-2], patch.PATCHES, *patch.PATCHES.rglob("*")):
                    path.chmod(path.stat().st_mode | 0o005)
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            os.environ["HOME"] = "/nonexistent"
            patch.apply(checkout)
        except BaseException as error:
            os.write(writer, repr(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    message = os.read(reader, 10000).decode()
    (checkout / folder).chmod(0o755)
    assert message.startswith("Refusal") and "no permission to write" in message
    assert contents(checkout) == {path: data for path, (*_, data) in before.items() if (checkout / path).is_file()}


def test_a_disk_that_fills_up_leaves_nothing_behind(checkout, monkeypatch):
    before, replace, calls = snapshot(checkout), os.replace, []

    def failing(source, target):
        calls.append(target)
        if len(calls) == 3:
            raise OSError(28, "No space left on device", str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    result = CliRunner().invoke(patch.app, ["apply", "--slime-root", str(checkout)])
    assert result.exit_code == 2
    assert "No space left on device" in result.stderr and result.stderr.count("\n") == 1
    assert snapshot(checkout) == before and not list((checkout / ".git").glob("*slime-fipo*"))


def killed_at_line(action, root, number):
    """Run ``action`` in a child that is killed before its ``number``-th line of writing; False if it ended before."""
    lines = 0

    def trace(frame, event, _):
        nonlocal lines
        if frame.f_code.co_filename != patch.__file__ or frame.f_code.co_name not in writing:
            return None
        if event == "line":
            lines += 1
            if lines == number:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    writing = ("write", "_replace")
    child = os.fork()
    if child == 0:
        sys.settrace(trace)
        try:
            action(root)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("interrupted", [patch.apply, patch.revert])
def test_killed_at_any_moment_the_next_call_repairs(checkout, interrupted):
    following = (patch.check, patch.apply, patch.revert)
    start = BASE if interrupted is patch.apply else AFTER
    number, broken = 0, 0
    while True:
        write(checkout, start)
        if start is BASE:
            (checkout / "slime/utils/fipo.py").unlink(missing_ok=True)
        before, number = snapshot(checkout), number + 1
        if not killed_at_line(interrupted, checkout, number):
            break
        broken += contents(checkout) not in (BASE, AFTER)
        journal = (checkout / ".git/slime-fipo-patch.json").exists()
        action = following[number % 3]
        action(checkout)
        # A repair leads to the unpatched tree; a kill before the first change left nothing to repair.
        expected = AFTER if action is patch.apply else BASE if action is patch.revert or journal else start
        assert contents(checkout) == expected, number
        assert all(snapshot(checkout)[path][:3] == before[path][:3] for path in BASE), number
        assert not (checkout / ".git/slime-fipo-patch.json").exists()
    assert broken >= 4
    assert contents(checkout) == (AFTER if interrupted is patch.apply else BASE)


def leave_interrupted(checkout):
    number = 1
    while "fipo.py" not in "".join(contents(checkout)) or ".slime-fipo" not in "".join(contents(checkout)):
        assert killed_at_line(patch.apply, checkout, number)
        number += 1


def test_repair_leaves_a_file_that_was_edited_since(checkout):
    leave_interrupted(checkout)
    (checkout / "slime/utils/loss.py").write_bytes(b"mine\n")
    refuses(checkout, "interrupted", "slime/utils/loss.py was edited")
    git(checkout, "checkout", "--", "slime/utils/loss.py")
    assert "was undone" in patch.check(checkout)
    assert contents(checkout) == BASE


def test_a_journal_that_names_files_elsewhere_harms_nothing(checkout, tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine\n")
    for path in (str(victim), "../victim"):
        ids = {"before": None, "after": patch._blob_id(b"mine\n"), "mode": "100644"}
        (checkout / ".git/slime-fipo-patch.json").write_text(json.dumps({path: ids}))
        refuses(checkout, "edited since")
        assert victim.read_bytes() == b"mine\n"


def test_two_at_once(checkout):
    folder = os.open(checkout / ".git", os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    refuses(checkout, "another slime-fipo patch is at work", actions=(patch.apply, patch.revert))
    os.close(folder)
    patch.apply(checkout)


def test_from_inside_a_git_hook(checkout, origin, monkeypatch):
    """git sets GIT_DIR and the like for what it starts."""
    monkeypatch.setenv("GIT_DIR", str(origin[0] / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(origin[0] / ".git/index"))
    patch.apply(checkout)
    assert contents(checkout) == AFTER
    patch.revert(checkout)
    assert contents(checkout) == BASE


def test_command_line(checkout, monkeypatch):
    from slime_fipo.cli import app

    def run(*arguments):
        return CliRunner().invoke(app, ["patch", *arguments])

    listed = run("list", "--slime-root", str(checkout))
    assert listed.exit_code == 0 and f"<- {checkout}" in listed.stdout and ".patch" in listed.stdout
    assert run("list").exit_code == 0
    for command, word in (("check", "clean"), ("apply", "--loss-type fipo_loss"), ("revert", "as before")):
        done = run(command, "--slime-root", str(checkout))
        assert (done.exit_code, done.stderr) == (0, "") and word in done.stdout
    monkeypatch.setenv("SLIME_ROOT", str(checkout))
    assert run("check").exit_code == 0

    refused = run("apply", "--slime-root", str(checkout.parent))
    assert refused.exit_code == 2 and refused.stdout == ""
    assert refused.stderr.startswith("slime-fipo patch: ") and refused.stderr.count("\n") == 1


def test_needs_neither_slime_nor_megatron_nor_ray():
    code = "import sys, slime_fipo.cli; print({'slime', 'megatron', 'ray'} & {m.split('.')[0] for m in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
