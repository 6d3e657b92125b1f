"""``slime-fipo patch``: builds FIPO into a checkout of slime, for ``python3 train.py --loss-type fipo_loss`` by itself.

Applies and reverts the series in ``patches/`` on the working tree. Commits nothing, and touches no file but those that
the series names. A file is taken for what its bytes are: the base's, the patch's, or somebody else's, and those of
somebody else are never written over. How the patches are made is in ``patches/build.py``.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

PATCHES = Path(__file__).parent / "patches"

app = typer.Typer(no_args_is_help=True, help="Build FIPO into a checkout of slime, or take it out again.")


class Refusal(Exception):
    """Nothing was changed; the message says what was found and what works instead."""


@dataclass(frozen=True)
class Series:
    """The patches for one base, as ``patches/series.json`` describes them.

    Attributes:
        name: of the base, and of the folder with its patches.
        commit, describe: the base in slime's history.
        tree: git's id of the base's files; ``results``: of the files after each patch.
        patches: file names, in order.
        files: path -> {"before": blob id or None, "after": blob id, "mode": git's}.
    """

    name: str
    commit: str
    describe: str
    tree: str
    results: list[str]
    patches: list[str]
    files: dict[str, dict]

    @property
    def paths(self) -> list[Path]:
        return [PATCHES / self.name / patch for patch in self.patches]


def all_series() -> list[Series]:
    described = json.loads((PATCHES / "series.json").read_text(encoding="utf-8"))
    return [Series(name, **fields) for name, fields in described.items()]


def _supported() -> str:
    return " and ".join(f"{s.name} ({s.commit[:12]})" for s in all_series())


def _blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Checkout:
    """A git checkout of slime.

    Raises:
        Refusal: the folder is none.
    """

    def __init__(self, root: Path, writing: bool = False) -> None:
        self.root = root.expanduser().resolve()
        if not self.root.is_dir():
            raise Refusal(f"{root} is no folder; give the one that you cloned slime into")
        if not (self.root / "train.py").is_file() or not (self.root / "slime" / "utils" / "arguments.py").is_file():
            raise Refusal(
                f"{root} is no slime checkout: no train.py beside slime/; give the folder that you cloned into"
            )
        if not (self.root / ".git").exists():
            raise Refusal(
                f"{root} is no git checkout, so there is no telling which slime it is: git clone slime, or use the"
                " plugin (python3 -m slime_fipo train.py), which changes no file of slime"
            )
        if writing and not os.access(self.root, os.W_OK | os.X_OK):
            raise Refusal(f"no permission to write in {self.root}; run as the user who owns it")
        self.git_dir = Path(self.git("rev-parse", "--absolute-git-dir").decode().strip())
        self.journal = self.git_dir / "slime-fipo-patch.json"

    def git(self, *arguments: str) -> bytes:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        command = ["git", "--no-optional-locks", "-c", "core.fsmonitor=false", "-c", "core.quotePath=false", *arguments]
        try:
            done = subprocess.run(command, cwd=self.root, env=environment, capture_output=True)
        except FileNotFoundError:
            raise Refusal("git is not installed, and is needed to tell which slime this is") from None
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {done.returncode}"]
            raise Refusal(f"git {arguments[0]} failed in {self.root}: {said[0]}")
        return done.stdout

    def detect(self) -> tuple[Series, int]:
        """The series for what HEAD holds, and how many of its patches are in HEAD as commits.

        Raises:
            Refusal: HEAD is none of the supported bases.
        """
        tree = self.git("rev-parse", "HEAD^{tree}").decode().strip()
        for series in all_series():
            states = [series.tree, *series.results]
            if tree in states:
                return series, states.index(tree)
        head = self.git("rev-parse", "--short=12", "HEAD").decode().strip()
        described = self.git("describe", "--tags", "--always", "HEAD").decode().strip()
        found = head if described.startswith(head[:7]) else f"{head} ({described})"
        raise Refusal(
            f"{self.root} is at {found}, for which there is no patch; there are patches for {_supported()}:"
            f" git -C {self.root} worktree add ../slime-fipo {all_series()[0].commit[:12]}, or use the plugin"
            " (python3 -m slime_fipo train.py)"
        )

    def state_of(self, path: str, ids: dict) -> str:
        """``before``, ``after`` or ``other``: what the file is, by its bytes."""
        file = self.root / path
        if file.is_symlink() or not file.is_relative_to(self.root) or file.parent.resolve() != file.parent:
            return "other"
        try:
            found = _blob_id(file.read_bytes())
        except FileNotFoundError:
            found = None
        except OSError:
            return "other"
        return {ids["before"]: "before", ids["after"]: "after"}.get(found, "other")

    def states(self, files: dict[str, dict]) -> dict[str, str]:
        return {path: self.state_of(path, ids) for path, ids in files.items()}

    @contextlib.contextmanager
    def locked(self, files: dict[str, dict]) -> Iterator[None]:
        """Hold the checkout for this process, once everything that is to be written can be.

        Raises:
            Refusal: no write permission, or another process holds it.
        """
        for folder in sorted({self.git_dir, *((self.root / path).parent for path in files)}):
            if not os.access(folder, os.W_OK | os.X_OK):
                raise Refusal(f"no permission to write in {folder}; run as the user who owns {self.root}")
        import fcntl  # POSIX only, as slime is; the rest of the command line works elsewhere too

        folder = os.open(self.git_dir, os.O_RDONLY)
        try:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Refusal(f"another slime-fipo patch is at work in {self.root}; wait for it") from None
            yield
        finally:
            os.close(folder)

    def write(self, files: dict[str, dict], contents: dict[str, bytes | None]) -> None:
        """Write all of ``contents`` (path -> bytes, or None to remove) or, on any error, none.

        Every file goes to a temporary name first and is renamed last; in between, the journal says how to go back, for
        :meth:`repair` after a kill.
        """
        self._replace(self.journal, json.dumps(files).encode(), 0o644)
        try:
            for path, data in contents.items():
                if data is not None:
                    mode = 0o755 if files[path]["mode"] == "100755" else 0o644
                    self._write_temporary(self.root / path, data, mode)
            for path, data in contents.items():
                file = self.root / path
                if data is None:
                    file.unlink(missing_ok=True)
                else:
                    os.replace(_temporary(file), file)
        except BaseException:
            self.repair()
            raise
        self.journal.unlink()

    def repair(self) -> bool:
        """Take an interrupted apply or revert back to the unpatched tree. True if there was one.

        Raises:
            Refusal: a file was edited since; it is left alone.
        """
        if not self.journal.exists():
            return False
        files = json.loads(self.journal.read_text(encoding="utf-8"))
        edited = [path for path, state in self.states(files).items() if state == "other"]
        if edited:
            raise Refusal(
                f"an interrupted slime-fipo patch left {self.root} half done, and {edited[0]} was edited since; move"
                " it away, and call again"
            )
        for path, ids in files.items():
            file = self.root / path
            if ids["before"] is None:
                file.unlink(missing_ok=True)
            elif self.state_of(path, ids) == "after":
                self._replace(file, self.git("cat-file", "blob", ids["before"]), 0o644)
            _temporary(file).unlink(missing_ok=True)
        self.journal.unlink()
        return True

    def _replace(self, file: Path, data: bytes, mode: int) -> None:
        self._write_temporary(file, data, mode)
        os.replace(_temporary(file), file)

    def _write_temporary(self, file: Path, data: bytes, mode: int) -> None:
        temporary = _temporary(file)
        temporary.write_bytes(data)
        try:
            found = file.stat()
        except FileNotFoundError:
            mask = os.umask(0)
            os.umask(mask)
            temporary.chmod(mode & ~mask)
            return
        temporary.chmod(found.st_mode & 0o7777)
        if (found.st_uid, found.st_gid) != (os.geteuid(), os.getegid()):
            with contextlib.suppress(PermissionError):
                os.chown(temporary, found.st_uid, found.st_gid)


def _temporary(file: Path) -> Path:
    return file.with_name(f".{file.name}.slime-fipo")


def _patched(checkout: Checkout, series: Series) -> dict[str, bytes]:
    """The patched bytes of every file, made aside from the checkout."""
    with tempfile.TemporaryDirectory(prefix="slime-fipo-patch-") as scratch:
        for path, ids in series.files.items():
            file = Path(scratch) / path
            file.parent.mkdir(parents=True, exist_ok=True)
            if ids["before"] is not None:
                file.write_bytes(checkout.git("cat-file", "blob", ids["before"]))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        environment |= {"GIT_CEILING_DIRECTORIES": str(Path(scratch).parent), "GIT_CONFIG_GLOBAL": os.devnull}
        command = ["git", "apply", "--whitespace=nowarn", *(str(path.resolve()) for path in series.paths)]
        done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True)
        contents = {path: (Path(scratch) / path).read_bytes() for path in series.files} if not done.returncode else {}
    wrong = [path for path, ids in series.files.items() if _blob_id(contents.get(path, b"")) != ids["after"]]
    if wrong:
        raise Refusal(f"the patches in {PATCHES} do not make {wrong[0]} what they should; install slime-fipo again")
    return contents


def _refuse_if_dirty(checkout: Checkout, states: dict[str, str]) -> None:
    """Refuse changes to tracked files anywhere, and files of the user's where the series adds its own."""
    status = checkout.git("status", "--porcelain=v1", "-z", "--untracked-files=no", "--no-renames").decode().split("\0")
    changed = [entry[3:] for entry in status if entry]
    changed += [path for path, state in states.items() if state != "before" and path not in changed]
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise Refusal(
            f"{checkout.root} is not clean: {changed[0]}{more} changed since its commit; git stash, or patch a fresh"
            f" copy: git -C {checkout.root} worktree add ../slime-fipo HEAD"
        )


def _refuse_if_half(checkout: Checkout, series: Series, states: dict[str, str]) -> None:
    found = set(states.values())
    if "after" in found and found != {"after"}:
        rest = [path for path, state in states.items() if state != "after"]
        patched = len(states) - len(rest)
        tracked = " ".join(path for path, ids in series.files.items() if ids["before"] is not None)
        added = " ".join(path for path, ids in series.files.items() if ids["before"] is None)
        raise Refusal(
            f"{checkout.root} is half patched: {patched} of {len(states)} files are as the {series.name} series leaves"
            f" them, {rest[0]} is not; go back with git -C {checkout.root} checkout HEAD -- {tracked} and, in there,"
            f" rm -f {added}"
        )


def _refuse_commits(checkout: Checkout, series: Series, commits: int) -> None:
    if commits:
        raise Refusal(
            f"{checkout.root} holds {commits} of the {len(series.patches)} {series.name} patches as commits (git am);"
            f" without them: git -C {checkout.root} checkout {series.commit[:12]}"
        )


def check(root: Path) -> str:
    """What ``apply`` would find, in one sentence.

    Raises:
        Refusal: what ``apply`` would refuse.
    """
    checkout = Checkout(root)
    note = _repair(checkout)
    series, commits = checkout.detect()
    if commits == len(series.patches):
        return f"{note}{checkout.root} is slime {series.name} with FIPO built in, as commits"
    _refuse_commits(checkout, series, commits)
    states = checkout.states(series.files)
    if set(states.values()) == {"after"}:
        return f"{note}{checkout.root} is slime {series.name} with FIPO built in; slime-fipo patch revert takes it out"
    _refuse_if_half(checkout, series, states)
    _refuse_if_dirty(checkout, states)
    _patched(checkout, series)
    return f"{note}{checkout.root} is slime {series.name}, unpatched and clean; slime-fipo patch apply builds FIPO in"


def apply(root: Path) -> str:
    """Build FIPO into the checkout; one sentence on what was done.

    Raises:
        Refusal: nothing was changed.
    """
    checkout = Checkout(root, writing=True)
    note = _repair(checkout)
    series, commits = checkout.detect()
    if commits == len(series.patches):
        return f"{note}{checkout.root} has FIPO built in already, as commits; nothing to do"
    _refuse_commits(checkout, series, commits)
    with checkout.locked(series.files):
        states = checkout.states(series.files)
        if set(states.values()) == {"after"}:
            return f"{note}{checkout.root} has FIPO built in already; nothing to do"
        _refuse_if_half(checkout, series, states)
        _refuse_if_dirty(checkout, states)
        checkout.write(series.files, _patched(checkout, series))
    return (
        f"{note}built FIPO into slime {series.name} at {checkout.root}: {len(series.files)} files written; train with"
        " python3 train.py --loss-type fipo_loss"
    )


def revert(root: Path) -> str:
    """Take FIPO out of the checkout, byte for byte; one sentence on what was done.

    Raises:
        Refusal: nothing was changed.
    """
    checkout = Checkout(root, writing=True)
    note = _repair(checkout)
    series, commits = checkout.detect()
    _refuse_commits(checkout, series, commits)
    with checkout.locked(series.files):
        states = checkout.states(series.files)
        if set(states.values()) == {"before"}:
            return f"{note}{checkout.root} has no FIPO built in; nothing to do"
        _refuse_if_half(checkout, series, states)
        edited = [path for path, state in states.items() if state == "other"]
        if edited:
            raise Refusal(f"{edited[0]} in {checkout.root} is neither slime's nor the patch's; nothing was reverted")
        staged = checkout.git("diff", "--cached", "--name-only", "-z", "--", *series.files).decode().split("\0")
        if staged[0]:
            raise Refusal(f"{staged[0]} is staged; git -C {checkout.root} restore --staged . first")
        originals = {
            path: checkout.git("cat-file", "blob", ids["before"]) if ids["before"] is not None else None
            for path, ids in series.files.items()
        }
        checkout.write(series.files, originals)
    return f"{note}took FIPO out of slime {series.name} at {checkout.root}: {len(series.files)} files as before"


def _repair(checkout: Checkout) -> str:
    if not checkout.journal.exists():
        return ""
    with checkout.locked(json.loads(checkout.journal.read_text(encoding="utf-8"))):
        return "an interrupted slime-fipo patch was undone; " if checkout.repair() else ""


# ---------------------------------------------------------------- commands

SlimeRoot = Annotated[
    Path, typer.Option("--slime-root", envvar="SLIME_ROOT", help="The folder that you cloned slime into.")
]


def _say(action, root: Path) -> None:
    try:
        print(action(root))
    except Refusal as refusal:
        print(f"slime-fipo patch: {refusal}", file=sys.stderr)
        raise typer.Exit(2) from None
    except OSError as error:
        full = "; free some space" if error.errno == errno.ENOSPC else ""
        where = error.filename or root
        print(f"slime-fipo patch: {where}: {error.strerror}{full}; nothing was changed", file=sys.stderr)
        raise typer.Exit(2) from None


@app.command("list")
def list_command(
    slime_root: Annotated[
        Path | None, typer.Option("--slime-root", help="Mark the base that this checkout of slime is at.")
    ] = None,
) -> None:
    """Show the supported versions of slime and their patches, which git am takes too."""
    here = None
    if slime_root is not None:
        with contextlib.suppress(Refusal):
            here = Checkout(slime_root).detect()[0].name
    for series in all_series():
        mark = f"  <- {slime_root}" if series.name == here else ""
        print(f"{series.name}  {series.commit[:12]}  {series.describe}{mark}")
        for path in series.paths:
            print(f"  {path.resolve()}")
    if slime_root is not None and here is None:
        print(f"{slime_root} is at none of them")


@app.command("check")
def check_command(slime_root: SlimeRoot) -> None:
    """Say whether the patches apply to a checkout of slime, or are in it."""
    _say(check, slime_root)


@app.command("apply")
def apply_command(slime_root: SlimeRoot) -> None:
    """Build FIPO into a clean checkout of slime: all of it or nothing. Commits nothing."""
    _say(apply, slime_root)


@app.command("revert")
def revert_command(slime_root: SlimeRoot) -> None:
    """Take FIPO out again: every byte as before."""
    _say(revert, slime_root)
