"""``slime-fipo patch``: builds FIPO into a checkout of slime with ``git apply``, all or nothing; commits nothing."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError

PATCHES = Path(__file__).parent / "patches"
SlimeRoot = Annotated[Path, typer.Option("--slime-root", help="a git checkout of slime")]
app = typer.Typer(no_args_is_help=True, help="Build FIPO into a checkout of slime, or take it out again.")


def _git_apply(root: Path, base: Path, *options: str) -> str:
    """What ``git apply`` says is wrong, or nothing. One input: git is atomic only over what it reads at once."""
    patches = b"".join(path.read_bytes() for path in sorted(base.glob("*.patch")))
    if shutil.which("git") is None:
        raise UserError("git is not installed; slime-fipo patch needs it")
    run = subprocess.run(["git", "-C", root, "apply", *options], input=patches, capture_output=True)
    return run.stderr.decode(errors="replace").splitlines()[0] if run.returncode else ""


def _fitting_base(root: Path, *options: str) -> Path:
    if not (root / "slime" / "utils" / "arguments.py").is_file() or not (root / ".git").exists():
        raise UserError(f"--slime-root {root} is not a git checkout of slime")
    errors = {base: _git_apply(root, base, "--check", *options) for base in sorted(PATCHES.iterdir()) if base.is_dir()}
    if fitting := [base for base, error in errors.items() if not error]:
        return fitting[0]
    hint = "FIPO is not built in, or its lines were edited" if options else "FIPO is built in already, or slime differs"
    raise UserError(f"--slime-root {root} was not changed: {hint} ({'; '.join(errors.values())})")


def _change(root: Path, done: str, *options: str) -> None:
    base = _fitting_base(root, *options)
    if error := _git_apply(root, base, *options):
        raise UserError(f"--slime-root {root}: {error}")
    typer.echo(f"{done} {base.name}: {root}")


@app.command()
def apply(slime_root: SlimeRoot) -> None:
    """Make python3 train.py --loss-type fipo_loss work by itself, without this package."""
    _change(slime_root, "applied")


@app.command()
def revert(slime_root: SlimeRoot) -> None:
    """Take the patch out of the working tree again."""
    _change(slime_root, "reverted", "--reverse")


@app.command()
def check(slime_root: SlimeRoot) -> None:
    """Say which patch would be applied; change nothing."""
    typer.echo(f"{_fitting_base(slime_root).name} fits {slime_root}")
