"""``slime-fipo patch`` on a small git checkout of slime's shape, made here: what it writes, refuses and repairs."""

import errno
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
PATHS = {**PATCHED[1], **PATCHED[2]}


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


def advised(root, action, start):
    """Do what the refusal says: run the part of the message from ``start`` on in a shell."""
    with pytest.raises(patch.Refusal) as refusal:
        action(root)
    command = start + str(refusal.value).partition(start)[2].partition(", or ")[0]
    return subprocess.run(["bash", "-ec", command], check=True, capture_output=True, text=True).stdout


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


def test_unknown_commit_in_a_clone_without_the_base(checkout, origin, tmp_path):
    write(checkout, {"train.py": b"another\n"})
    git(checkout, "commit", "--quiet", "--all", "--message", "another")
    git(checkout, "branch", "other")
    git(tmp_path, "clone", "--quiet", "--depth=1", "--branch=other", f"file://{checkout}", "shallow")
    git(tmp_path / "shallow", "config", f"url.file://{origin[0]}.insteadOf", patch.SLIME)
    refuses(tmp_path / "shallow", "for which there is no patch", f"fetch {patch.SLIME} {origin[2]} && git -C")
    advised(tmp_path / "shallow", patch.check, "git -C ")
    assert "unpatched and clean" in patch.check(tmp_path / "slime-fipo")


def test_no_commit_yet(checkout):
    shutil.rmtree(checkout / ".git")
    git(checkout, "init", "--quiet")
    refuses(checkout, "has no commit", f"git clone {patch.SLIME}")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_checkout_of_somebody_else(checkout, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SUDO_UID", raising=False)
    for path in (checkout, checkout / ".git"):
        os.chown(path, 65534, 65534)
    refuses(checkout, "dubious ownership")
    advised(checkout, patch.check, "git config --global --add safe.directory ")
    assert "unpatched and clean" in patch.check(checkout)


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("path", ["train.py", "slime/utils/arguments.py"])
def test_changed_files_are_left_alone(checkout, path, staged):
    with (checkout / path).open("ab") as file:
        file.write(b"mine\n")
    if staged:
        git(checkout, "add", path)
    refuses(checkout, path, f"{checkout} stash", actions=(patch.check, patch.apply))


def test_an_edit_that_git_does_not_show_is_seen(checkout):
    git(checkout, "update-index", "--assume-unchanged", "slime/utils/loss.py")
    (checkout / "slime/utils/loss.py").write_bytes(b"mine\n")
    assert git(checkout, "status", "--porcelain") == ""
    refuses(checkout, "slime/utils/loss.py", actions=(patch.check, patch.apply))


def test_line_endings_that_git_changes(origin, tmp_path, monkeypatch):
    monkeypatch.setattr(patch, "PATCHES", origin[1])
    git(tmp_path, "clone", "--quiet", "--no-checkout", str(origin[0]), "slime")
    git(tmp_path / "slime", "config", "core.autocrlf", "true")
    subprocess.run(["git", "checkout", "--quiet", origin[2]], cwd=tmp_path / "slime", check=True)
    assert b"\r\n" in (tmp_path / "slime/train.py").read_bytes()
    refuses(tmp_path / "slime", "line endings", "core.autocrlf", actions=(patch.check, patch.apply))
    advised(tmp_path / "slime", patch.check, "git -C ")
    patch.apply(tmp_path / "slime-fipo")
    patch.revert(tmp_path / "slime-fipo")
    assert contents(tmp_path / "slime-fipo") == BASE


def test_folders_that_are_not_there(checkout):
    shutil.rmtree(checkout / "scripts")
    refuses(checkout, "is not clean: scripts/run.sh", actions=(patch.check, patch.apply))
    advised(checkout, patch.check, "git -C ")
    git(checkout, "sparse-checkout", "set", "--no-cone", "/*", "!/scripts/")
    assert not (checkout / "scripts").exists()
    refuses(checkout, "scripts/run.sh is not checked out", actions=(patch.check, patch.apply))
    advised(checkout, patch.check, "git -C ")
    assert "unpatched and clean" in patch.check(checkout)


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
    refuses(checkout, "stash push --include-untracked -- slime/utils/fipo.py", actions=(patch.check, patch.apply))
    assert kind != "link" or (tmp_path / "elsewhere").read_bytes() == b"mine\n"


def test_a_linked_folder_is_not_followed(checkout, tmp_path):
    shutil.copytree(checkout / "scripts", tmp_path / "scripts")
    shutil.rmtree(checkout / "scripts")
    (checkout / "scripts").symlink_to(tmp_path / "scripts")
    refuses(checkout, f"{checkout} stash", actions=(patch.check, patch.apply))


@pytest.mark.parametrize("action", [patch.check, patch.apply, patch.revert])
def test_half_patched_by_git_apply_or_by_hand(checkout, origin, action):
    git(checkout, "apply", str(next((origin[1] / "fake").glob("0001*"))))
    refuses(checkout, "half patched", "scripts/run.sh is not", actions=(action,))
    advised(checkout, action, "cd ")
    assert contents(checkout) == BASE

    patch.apply(checkout)
    git(checkout, "checkout", "--quiet", "--", "slime/utils/loss.py")
    refuses(checkout, "half patched", "slime/utils/loss.py is not", actions=(action,))
    advised(checkout, action, "cd ")
    assert contents(checkout) == BASE and git(checkout, "status", "--porcelain") == ""


@pytest.mark.parametrize("edited", [["slime/utils/fipo.py"], ["slime/utils/fipo.py", "slime/utils/loss.py"]])
def test_edits_to_a_patched_tree_are_named_and_kept(checkout, edited):
    checkout = checkout.rename(checkout.parent / "a user's slime; rm -rf")
    patch.apply(checkout)
    write(checkout, {path: b"mine\n" for path in edited})
    refuses(checkout, "has FIPO built in, edited since", *edited, "git's stash")
    advised(checkout, patch.revert, "cd ")
    assert contents(checkout) == BASE and "unpatched and clean" in patch.check(checkout)
    for path in edited:
        tree = "stash@{0}" if path in BASE else "stash@{0}^3"
        assert git(checkout, "show", f"{tree}:{path}") == "mine\n"


def test_half_patched_and_edited_keeps_the_edit(checkout):
    patch.apply(checkout)
    write(checkout, {"slime/utils/loss.py": BASE["slime/utils/loss.py"], "slime/utils/fipo.py": b"mine\n"})
    refuses(checkout, "half patched", "git's stash")
    advised(checkout, patch.apply, "cd ")
    assert contents(checkout) == BASE and git(checkout, "show", "stash@{0}^3:slime/utils/fipo.py") == "mine\n"


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


def as_a_user(checkout, action):
    """What ``action`` returned or raised, in a child that owns the checkout but is not root."""
    if os.geteuid() == 0:
        for path in (checkout, *checkout.rglob("*")):
            os.chown(path, 65534, 65534, follow_symlinks=False)
        for path in (*checkout.parents[:-2], patch.PATCHES, *patch.PATCHES.rglob("*")):
            path.chmod(path.stat().st_mode | 0o005)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            os.environ["HOME"] = "/nonexistent"
            os.write(writer, str(action(checkout)).encode())
        except BaseException as error:
            os.write(writer, repr(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    with open(reader, encoding="utf-8") as said:
        return said.read()


@pytest.mark.parametrize("folder", [".", "slime/utils", ".git"])
def test_no_write_permission(checkout, folder):
    before = contents(checkout)
    (checkout / folder).chmod(0o555)
    for action in (patch.check, patch.apply):
        message = as_a_user(checkout, action)
        assert message.startswith("Refusal") and "no permission to write" in message
    (checkout / folder).chmod(0o755)
    assert contents(checkout) == before


def test_read_only_files_are_repaired_too(checkout):
    """Temporary files have the mode of what they replace, which their owner may not write to."""
    patch.apply(checkout)
    git(checkout, "config", "core.fileMode", "false")
    for path in AFTER:
        (checkout / path).chmod(0o444)
    modes = {path: state[:1] for path, state in snapshot(checkout).items() if path in BASE}
    assert as_a_user(checkout, lambda root: killed(patch.revert, root, replaces=1)) == "True"
    assert leftovers(checkout)
    # Killed twice more, where the repair has a temporary file with the read-only mode.
    assert as_a_user(checkout, lambda root: killed(patch.check, root, replaces=0)) == "True"
    assert as_a_user(checkout, lambda root: killed(patch.check, root, replaces=1)) == "True"
    assert "an interrupted slime-fipo patch was undone" in as_a_user(checkout, patch.revert)
    assert contents(checkout) == BASE and not leftovers(checkout)
    assert {path: state[:1] for path, state in snapshot(checkout).items() if path in BASE} == modes


def leftovers(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*slime-fipo*"))


def failing(monkeypatch, name, at, number=errno.ENOSPC):
    """Let the calls of ``os.NAME`` that ``at`` holds the numbers of fail."""
    real, calls = getattr(os, name), []

    def function(*arguments, **options):
        calls.append(arguments)
        if len(calls) in at:
            raise OSError(number, os.strerror(number), str(arguments[-1]))
        return real(*arguments, **options)

    monkeypatch.setattr(os, name, function)


@pytest.mark.parametrize(
    ("command", "name", "at", "after"),
    [
        ("apply", "mkdir", {1}, "nothing was changed"),  # of the folder that the patched files are made in
        ("apply", "fsync", {1}, "are whole, without FIPO"),
        ("apply", "replace", {3}, "are whole, without FIPO"),
        ("revert", "replace", {1}, "are whole, with FIPO built in"),
        ("revert", "replace", {3}, "are whole, without FIPO"),
    ],
)
def test_an_error_in_the_middle_leaves_a_whole_tree_and_says_which(checkout, monkeypatch, command, name, at, after):
    if command == "revert":
        patch.apply(checkout)
    failing(monkeypatch, name, at)
    result = CliRunner().invoke(patch.app, [command, "--slime-root", str(checkout)])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "No space left on device; free some space" in result.stderr and result.stderr.endswith(f" {after}\n")
    assert contents(checkout) == (AFTER if "built in" in after else BASE) and not leftovers(checkout)


def test_an_error_in_the_repair_too_is_undone_by_the_next_call(checkout, monkeypatch):
    patch.apply(checkout)
    failing(monkeypatch, "replace", {2, 3}, errno.EIO)
    result = CliRunner().invoke(patch.app, ["revert", "--slime-root", str(checkout)])
    assert result.exit_code == 2 and "nothing was changed" not in result.stderr
    assert "may be half patched; call again to undo that" in result.stderr
    assert contents(checkout) not in (BASE, AFTER)
    assert "was undone" in patch.check(checkout)
    assert contents(checkout) == BASE and not leftovers(checkout)


def killed(action, root, replaces=None, line=None):
    """Run ``action`` in a child that is killed after so many replaced files, or before the ``line``-th line of writing.

    False if it ended before.
    """
    child = os.fork()
    if child == 0:
        replace, passed = os.replace, {"replace": 0, "line": 0}

        def die_at(kind, number):
            passed[kind] += 1
            if passed[kind] == number:
                os.kill(os.getpid(), signal.SIGKILL)

        def replacing(source, target):
            die_at("replace", replaces + 1)
            replace(source, target)

        def trace(frame, event, _):
            code = frame.f_code
            if code.co_filename != patch.__file__ or code.co_name not in ("write", "_write_temporary", "repair"):
                return None
            if event == "line":
                die_at("line", line)
            return trace

        try:
            if line is None:
                os.replace = replacing
            else:
                sys.settrace(trace)
            action(root)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("interrupted", [patch.apply, patch.revert])
def test_killed_at_any_moment_the_next_call_repairs(checkout, interrupted):
    """Every other time the repair is killed as well, each time at another line."""
    following = (patch.check, patch.apply, patch.revert)
    start, end = (BASE, AFTER) if interrupted is patch.apply else (AFTER, BASE)
    broken, repairs, line = 0, 0, 1
    while True:
        write(checkout, start)
        if start is BASE:
            (checkout / "slime/utils/fipo.py").unlink(missing_ok=True)
        before = snapshot(checkout)
        if not killed(interrupted, checkout, line=line):
            break
        found = {path: data for path, data in contents(checkout).items() if "slime-fipo" not in path}
        half = found not in (BASE, AFTER)
        broken += half
        if half and broken % 2:
            repairs += killed(patch.check, checkout, line=1 + line % 29)
        action = following[line % 4 % 3]
        action(checkout)
        whole = BASE if half else found
        assert contents(checkout) == {patch.check: whole, patch.apply: AFTER, patch.revert: BASE}[action], line
        assert all(snapshot(checkout)[path][:3] == before[path][:3] for path in BASE), line
        assert not leftovers(checkout)
        line += 3
    assert broken >= 2 and repairs >= 1
    assert contents(checkout) == end


def test_repair_leaves_a_file_that_was_edited_since(checkout, tmp_path):
    assert killed(patch.apply, checkout, replaces=2)
    (checkout / "slime/utils/loss.py").write_bytes(b"mine\n")
    refuses(checkout, "interrupted", "slime/utils/loss.py was edited since; move it away, and call again")
    (checkout / "slime/utils/loss.py").rename(tmp_path / "loss.py")
    assert "was undone" in patch.check(checkout)
    assert contents(checkout) == BASE and git(checkout, "status", "--porcelain") == ""


def test_another_commit_since_leaves_nothing_to_repair(checkout, origin):
    """By git am, the next commit has the very files that the journal would have removed."""
    assert killed(patch.apply, checkout, replaces=2)
    journal = (checkout / ".git/slime-fipo-patch.json").read_bytes()
    temporary = checkout / "slime/utils/.loss.py.slime-fipo"
    git(checkout, "reset", "--quiet", "--hard")
    git(checkout, "clean", "-fdq")
    git(checkout, "am", "--quiet", "--keep-cr", *map(str, sorted((origin[1] / "fake").iterdir())))
    for action in (patch.check, patch.apply, patch.revert):
        (checkout / ".git/slime-fipo-patch.json").write_bytes(journal)
        temporary.write_bytes(b"half a fi")
        try:
            assert "undone" not in action(checkout)
        except patch.Refusal as refusal:
            assert action is patch.revert and "as commits" in str(refusal)
        assert contents(checkout) == AFTER and not leftovers(checkout)

    write(checkout, {"train.py": b"another slime\n"})
    git(checkout, "commit", "--quiet", "--all", "--message", "another")
    (checkout / ".git/slime-fipo-patch.json").write_bytes(journal)
    refuses(checkout, "for which there is no patch")
    assert not leftovers(checkout)


@pytest.mark.parametrize("kind", ["file", "link"])
def test_temporary_names_of_the_users_are_left_alone(checkout, tmp_path, kind):
    taken, victim = checkout / "slime/utils/.arguments.py.slime-fipo", tmp_path / "victim"
    victim.write_bytes(b"mine\n")
    if kind == "link":
        taken.symlink_to(victim)
    else:
        taken.write_bytes(b"mine\n")
    refuses(checkout, str(taken), "move it away", actions=(patch.check, patch.apply))
    taken.rename(tmp_path / "moved")
    patch.apply(checkout)
    (tmp_path / "moved").rename(taken)
    refuses(checkout, str(taken), "move it away", actions=(patch.revert,))
    assert victim.read_bytes() == taken.read_bytes() == b"mine\n"


@pytest.mark.parametrize("current", [True, False])
def test_a_journal_that_names_files_elsewhere_harms_nothing(checkout, tmp_path, current):
    outside = {tmp_path / name: b"mine\n" for name in ("victim", ".victim.slime-fipo", ".slime.slime-fipo")}
    for file, data in outside.items():
        file.write_bytes(data)
    ids = {"before": None, "after": patch._blob_id(b"mine\n"), "mode": "100644"}
    mine = {"train.py": {**ids, "before": patch._blob_id(BASE["train.py"])}, "slime/utils/new.py": ids}
    for path in (str(tmp_path / "victim"), "../victim", ".", "slime/../../victim"):
        journal = {"tree": patch.Checkout(checkout).tree() if current else "0" * 40, "files": {**mine, path: ids}}
        write(checkout, {"slime/utils/new.py": b"mine\n", ".git/slime-fipo-patch.json": json.dumps(journal).encode()})
        if current:
            refuses(checkout, "edited since")
        else:
            patch.check(checkout)
        assert all(file.read_bytes() == data for file, data in outside.items())


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

    monkeypatch.delenv("SLIME_ROOT", raising=False)
    listed = run("list", "--slime-root", str(checkout))
    assert listed.exit_code == 0 and f"<- {checkout}" in listed.stdout and ".patch" in listed.stdout
    assert run("list").exit_code == 0 and "<-" not in run("list").stdout
    wrong = run("list", "--slime-root", str(checkout / "missing"))
    assert wrong.exit_code == 2 and "is no folder" in wrong.stderr
    assert "interrupted" in run("check", "--help").stdout
    for command, word in (("check", "clean"), ("apply", "--loss-type fipo_loss"), ("revert", "as before")):
        done = run(command, "--slime-root", str(checkout))
        assert (done.exit_code, done.stderr) == (0, "") and word in done.stdout
    monkeypatch.setenv("SLIME_ROOT", str(checkout))
    assert run("check").exit_code == 0 and run("list").stdout == listed.stdout

    refused = run("apply", "--slime-root", str(checkout.parent))
    assert refused.exit_code == 2 and refused.stdout == ""
    assert refused.stderr.startswith("slime-fipo patch: ") and refused.stderr.count("\n") == 1


def test_needs_neither_slime_nor_megatron_nor_ray():
    code = "import sys, slime_fipo.cli; print({'slime', 'megatron', 'ray'} & {m.split('.')[0] for m in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
