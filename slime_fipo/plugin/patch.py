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
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

PATCHES = Path(__file__).parent / "patches"
SLIME = "https://github.com/THUDM/slime"

app = typer.Typer(no_args_is_help=True, help="Build FIPO into a checkout of slime, or take it out again.")


class Refusal(Exception):
    """The message says what was found and what works instead; no file was changed, unless it says so."""


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

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().resolve()
        self.command = shlex.join(["git", "-C", str(self.root)])  # for advice
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
            said = " ".join(done.stderr.decode(errors="replace").split()) or f"exit status {done.returncode}"
            raise Refusal(f"git {arguments[0]} failed in {self.root}: {said}")
        return done.stdout

    def tree(self) -> str:
        """git's id of the files that HEAD holds."""
        try:
            return self.git("rev-parse", "--verify", "HEAD^{tree}").decode().strip()
        except Refusal:
            raise Refusal(
                f"{self.root} has no commit, so there is no telling which slime it is: git clone {SLIME}"
            ) from None

    def fetched(self, commit: str) -> str:
        """For advice that names a commit of slime's: the command to run before it, if the commit is not here yet."""
        try:
            self.git("cat-file", "-e", f"{commit}^{{commit}}")
        except Refusal:
            return f"{self.command} fetch {SLIME} {commit} && "
        return ""

    def detect(self) -> tuple[Series, int]:
        """The series for what HEAD holds, and how many of its patches are in HEAD as commits.

        Raises:
            Refusal: HEAD is none of the supported bases.
        """
        tree = self.tree()
        for series in all_series():
            states = [series.tree, *series.results]
            if tree in states:
                return series, states.index(tree)
        head = self.git("rev-parse", "--short=12", "HEAD").decode().strip()
        described = self.git("describe", "--tags", "--always", "HEAD").decode().strip()
        found = head if described.startswith(head[:7]) else f"{head} ({described})"
        commit = all_series()[0].commit
        raise Refusal(
            f"{self.root} is at {found}, for which there is no patch; there are patches for {_supported()}:"
            f" {self.fetched(commit)}{self.command} worktree add ../slime-fipo {commit[:12]}, or use the plugin"
            " (python3 -m slime_fipo train.py)"
        )

    def inside(self, path: str) -> bool:
        """False where a linked folder, or a "..", leads elsewhere."""
        folder = (self.root / path).parent
        return folder.is_relative_to(self.root) and folder.resolve() == folder

    def state_of(self, path: str, ids: dict) -> str:
        """What the file is, by its bytes: ``before``, ``after``, ``missing`` (and slime has it) or ``other``."""
        file = self.root / path
        if file.is_symlink() or not self.inside(path):
            return "other"
        try:
            found = _blob_id(file.read_bytes())
        except FileNotFoundError:
            return "before" if ids["before"] is None else "missing"
        except OSError:
            return "other"
        return {ids["before"]: "before", ids["after"]: "after"}.get(found, "other")

    def states(self, files: dict[str, dict]) -> dict[str, str]:
        return {path: self.state_of(path, ids) for path, ids in files.items()}

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the checkout for this process.

        Raises:
            Refusal: another process holds it.
        """
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
        """Write all of ``contents`` (path -> bytes, or None to remove).

        Every file goes to a temporary name first and is renamed last; in between, the journal says how to go back, for
        :meth:`repair`: in here after an error, in the next call after a kill.

        Raises:
            Refusal: something is in the way, and nothing was changed; or there was an error in the middle, and the
                message says whether the files are all patched or all unpatched now.
        """
        self.refuse_obstacles(files)
        journal = {"tree": self.tree(), "files": files}
        try:
            with self.journal.open("x", encoding="utf-8") as stream:
                json.dump(journal, stream)
                stream.flush()
                os.fsync(stream.fileno())
            for path, data in contents.items():
                if data is not None:
                    self._write_temporary(path, data, files[path]["mode"])
            for path, data in contents.items():
                file = self.root / path
                if data is None:
                    file.unlink(missing_ok=True)
                else:
                    os.replace(_temporary(file), file)
            self.journal.unlink()
        except BaseException as error:
            self.repair()
            if not isinstance(error, OSError):
                raise
            built = "with FIPO built in" if "after" in self.states(files).values() else "without FIPO"
            raise Refusal(f"{_reason(error)}; all files of {self.root} are whole, {built}") from error

    def repair(self) -> str:
        """Take an apply or revert that was interrupted half way back to the unpatched tree; words for it, if it did.

        If none or all of the files were written, or HEAD has moved since, there is nothing to take back: then only the
        temporary files go, and the journal.

        Raises:
            Refusal: a file was edited since, and is left alone; or it cannot be done now.
        """
        if not self.journal.exists():
            return ""
        try:
            journal = json.loads(self.journal.read_text(encoding="utf-8"))
        except ValueError:  # killed while writing the journal, before anything else
            journal = {"tree": None, "files": {}}
        files = journal["files"]
        states = self.states(files) if self.tree() == journal["tree"] else {}
        half = {"before", "after"} <= set(states.values())
        edited = [path for path, state in states.items() if state == "other"]
        if half and edited:
            raise Refusal(
                f"an interrupted slime-fipo patch left {self.root} half done, and {edited[0]} was edited since; move"
                " it away, and call again"
            )
        try:
            for path in filter(self.inside, files):
                _temporary(self.root / path).unlink(missing_ok=True)
            for path in [path for path, state in states.items() if half and state != "before"]:
                ids, file = files[path], self.root / path
                if ids["before"] is None:
                    file.unlink()
                else:
                    self._write_temporary(path, self.git("cat-file", "blob", ids["before"]), ids["mode"])
                    os.replace(_temporary(file), file)
            self.journal.unlink()
        except OSError as error:
            raise Refusal(f"{_reason(error)}; {self.root} may be half patched; call again to undo that") from error
        return "an interrupted slime-fipo patch was undone; " if half else ""

    def refuse_obstacles(self, files: dict[str, dict]) -> None:
        """Refuse what is in the way of :meth:`write`: folders that cannot be written in, taken temporary names."""
        for folder in sorted({self.root, self.git_dir, *((self.root / path).parent for path in files)}):
            if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
                raise Refusal(f"no permission to write in {folder}; run as the user who owns {self.root}")
        for path in files:
            if os.path.lexists(_temporary(self.root / path)):
                raise Refusal(f"{_temporary(self.root / path)} has a name that slime-fipo patch needs; move it away")

    def _write_temporary(self, path: str, data: bytes, mode: str) -> None:
        file = self.root / path
        temporary = _temporary(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as stream:  # x: neither over a file nor through a link
            stream.write(data)
        try:
            found = file.stat()
        except FileNotFoundError:
            if mode == "100755":
                made = temporary.stat().st_mode & 0o777
                temporary.chmod(made | (made & 0o444) >> 2)
            return
        temporary.chmod(found.st_mode & 0o7777)
        if (found.st_uid, found.st_gid) != (os.geteuid(), os.getegid()):
            with contextlib.suppress(PermissionError):
                os.chown(temporary, found.st_uid, found.st_gid)


def _temporary(file: Path) -> Path:
    return file.with_name(f".{file.name}.slime-fipo")


def _reason(error: OSError) -> str:
    full = "; free some space" if error.errno == errno.ENOSPC else ""
    return f"{error.filename}: {error.strerror}{full}" if error.filename else f"{error.strerror}{full}"


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


def _refuse_if_dirty(checkout: Checkout, series: Series, states: dict[str, str]) -> None:
    """Refuse changes to tracked files anywhere, and files of the user's where the series adds its own."""
    status = checkout.git("status", "--porcelain=v1", "-z", "--untracked-files=no", "--no-renames").decode().split("\0")
    changed = [entry[3:] for entry in status if entry]
    unseen = [path for path, state in states.items() if state != "before" and path not in changed]
    for path in unseen:
        before = series.files[path]["before"]
        if states[path] == "missing":
            raise Refusal(f"{path} is not checked out in {checkout.root}; {checkout.command} sparse-checkout disable")
        if before and checkout.git("hash-object", "--path", path, path).decode().strip() == before:
            raise Refusal(
                f"{path} in {checkout.root} has other line endings than slime's (core.autocrlf, or another filter of"
                f" git's); {checkout.command} -c core.autocrlf=false worktree add ../slime-fipo HEAD"
            )
    if changed or unseen:
        first, *others = [*changed, *unseen]
        more = f" and {len(others)} more" if others else ""
        untracked = "" if changed else f" push --include-untracked -- {shlex.join(unseen)}"
        raise Refusal(
            f"{checkout.root} is not clean: {first}{more} changed since its commit; {checkout.command}"
            f" stash{untracked}, or patch a fresh copy: {checkout.command} worktree add ../slime-fipo HEAD"
        )


def _refuse_if_half(checkout: Checkout, series: Series, states: dict[str, str]) -> None:
    """Refuse a tree that holds some of the patch, or an edited one.

    The advice removes only what is the patch's to the byte, and stashes what the user wrote.
    """
    found = set(states.values())
    if "after" not in found or found == {"after"}:
        return
    ours = [path for path, state in states.items() if state == "after"]
    tracked = [path for path in ours if series.files[path]["before"] is not None]
    added = [path for path in ours if series.files[path]["before"] is None]
    edited = [path for path, state in states.items() if state in ("other", "missing")]
    steps = {"git stash push --include-untracked --": edited, "git checkout HEAD --": tracked, "rm -f": added}
    commands = [f"cd {shlex.quote(str(checkout.root))}"]
    commands += [f"{command} {shlex.join(paths)}" for command, paths in steps.items() if paths]
    if "before" in found:
        rest = next(path for path, state in states.items() if state != "after")
        what = f"is half patched: {rest} is not as the {series.name} series leaves it, {len(ours)} of {len(states)} are"
    else:
        what = f"has FIPO built in, edited since (or by another version of slime-fipo): {', '.join(edited)}"
    how = "this takes FIPO out and keeps the edits in git's stash" if edited else "go back with"
    raise Refusal(f"{checkout.root} {what}; {how}: {' && '.join(commands)}")


def _refuse_commits(checkout: Checkout, series: Series, commits: int) -> None:
    if commits:
        raise Refusal(
            f"{checkout.root} holds {commits} of the {len(series.patches)} {series.name} patches as commits (git am);"
            f" without them: {checkout.fetched(series.commit)}{checkout.command} checkout {series.commit[:12]}"
        )


def check(root: Path) -> str:
    """What ``apply`` would find, in one sentence. Repairs what was interrupted, and changes nothing else.

    Raises:
        Refusal: what ``apply`` would refuse.
    """
    checkout, note = Checkout(root), ""
    if checkout.journal.exists():
        with checkout.locked():
            note = checkout.repair()
    series, commits = checkout.detect()
    if commits == len(series.patches):
        return f"{note}{checkout.root} is slime {series.name} with FIPO built in, as commits"
    _refuse_commits(checkout, series, commits)
    states = checkout.states(series.files)
    if set(states.values()) == {"after"}:
        return f"{note}{checkout.root} is slime {series.name} with FIPO built in; slime-fipo patch revert takes it out"
    _refuse_if_half(checkout, series, states)
    _refuse_if_dirty(checkout, series, states)
    checkout.refuse_obstacles(series.files)
    _patched(checkout, series)
    return f"{note}{checkout.root} is slime {series.name}, unpatched and clean; slime-fipo patch apply builds FIPO in"


def apply(root: Path) -> str:
    """Build FIPO into the checkout; one sentence on what was done.

    Raises:
        Refusal: it cannot be built in.
    """
    checkout = Checkout(root)
    with checkout.locked():
        note = checkout.repair()
        series, commits = checkout.detect()
        if commits == len(series.patches):
            return f"{note}{checkout.root} has FIPO built in already, as commits; nothing to do"
        _refuse_commits(checkout, series, commits)
        states = checkout.states(series.files)
        if set(states.values()) == {"after"}:
            return f"{note}{checkout.root} has FIPO built in already; nothing to do"
        _refuse_if_half(checkout, series, states)
        _refuse_if_dirty(checkout, series, states)
        checkout.write(series.files, _patched(checkout, series))
    return (
        f"{note}built FIPO into slime {series.name} at {checkout.root}: {len(series.files)} files written; train with"
        " python3 train.py --loss-type fipo_loss"
    )


def revert(root: Path) -> str:
    """Take FIPO out of the checkout, byte for byte; one sentence on what was done.

    Raises:
        Refusal: it cannot be taken out.
    """
    checkout = Checkout(root)
    with checkout.locked():
        note = checkout.repair()
        series, commits = checkout.detect()
        _refuse_commits(checkout, series, commits)
        states = checkout.states(series.files)
        if set(states.values()) == {"before"}:
            return f"{note}{checkout.root} has no FIPO built in; nothing to do"
        _refuse_if_half(checkout, series, states)
        edited = [path for path, state in states.items() if state in ("other", "missing")]
        if edited:
            raise Refusal(f"{edited[0]} in {checkout.root} is neither slime's nor the patch's; nothing was reverted")
        staged = checkout.git("diff", "--cached", "--name-only", "-z", "--", *series.files).decode().split("\0")
        if staged[0]:
            raise Refusal(f"{staged[0]} is staged; {checkout.command} restore --staged . first")
        originals = {
            path: checkout.git("cat-file", "blob", ids["before"]) if ids["before"] is not None else None
            for path, ids in series.files.items()
        }
        checkout.write(series.files, originals)
    return f"{note}took FIPO out of slime {series.name} at {checkout.root}: {len(series.files)} files as before"


def overview(root: Path | None) -> str:
    """The series and their patches, the one for the checkout at ``root`` marked.

    Raises:
        Refusal: ``root`` is no git checkout of slime.
    """
    checkout = here = None
    if root is not None:
        checkout = Checkout(root)
        with contextlib.suppress(Refusal):
            here = checkout.detect()[0].name
    lines = []
    for series in all_series():
        mark = f"  <- {root}" if series.name == here else ""
        lines.append(f"{series.name}  {series.commit[:12]}  {series.describe}{mark}")
        lines += [f"  {path.resolve()}" for path in series.paths]
    if checkout is not None and here is None:
        lines.append(f"{root} is at none of them")
    return "\n".join(lines)


# ---------------------------------------------------------------- commands

SlimeRoot = Annotated[
    Path, typer.Option("--slime-root", envvar="SLIME_ROOT", help="The folder that you cloned slime into.")
]


def _say(action, root: Path | None) -> None:
    try:
        print(action(root))
    except Refusal as refusal:
        print(f"slime-fipo patch: {refusal}", file=sys.stderr)
        raise typer.Exit(2) from None
    except OSError as error:  # while reading; write() and repair() refuse
        print(f"slime-fipo patch: {_reason(error)}; nothing was changed", file=sys.stderr)
        raise typer.Exit(2) from None


@app.command("list")
def list_command(
    slime_root: Annotated[
        Path | None,
        typer.Option("--slime-root", envvar="SLIME_ROOT", help="Mark the base that this checkout of slime is at."),
    ] = None,
) -> None:
    """Show the supported versions of slime and their patches, which git am takes too."""
    _say(overview, slime_root)


@app.command("check")
def check_command(slime_root: SlimeRoot) -> None:
    """Say whether the patches apply to a checkout of slime, or are in it. Undoes an interrupted apply or revert."""
    _say(check, slime_root)


@app.command("apply")
def apply_command(slime_root: SlimeRoot) -> None:
    """Build FIPO into a clean checkout of slime: all of it or nothing. Commits nothing."""
    _say(apply, slime_root)


@app.command("revert")
def revert_command(slime_root: SlimeRoot) -> None:
    """Take FIPO out again: every byte as before."""
    _say(revert, slime_root)
