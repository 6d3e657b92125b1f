"""A Hugging Face checkpoint with a longer context: linked weights and a new ``config.json``.

``python3 -m slime_fipo.recipes.extend_context SOURCE TARGET --positions 32768``. Qwen2.5-Math-7B declares 4,096
positions; the paper trains it, as DAPO's recipe does, with ``max_position_embeddings`` at 32,768 and its own rope base,
and so does this. The source stays untouched.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path


def extend_context(source: Path, target: Path, positions: int) -> bool:
    """Make ``target`` a checkpoint like ``source`` with ``positions`` positions.

    Everything but ``config.json`` is a symbolic link. The folder is written under a temporary name and then renamed, so
    a target that exists is a whole one; one that already has these positions is left as it is.

    Returns:
        Whether the target was written.

    Raises:
        ValueError: no checkpoint at the source, fewer positions than it has, or a target that is something else.
    """
    try:
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        declared = config["max_position_embeddings"]
    except (OSError, json.JSONDecodeError, KeyError, TypeError):
        raise ValueError(
            f"{source}/config.json is missing or says no max_position_embeddings; download the model"
        ) from None
    if positions < declared:
        raise ValueError(f"--positions {positions} is below the {declared} of {source}; there is nothing to extend")
    extended = {**config, "max_position_embeddings": positions}

    if target.exists():
        try:
            found = json.loads((target / "config.json").read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            found = None
        if found == extended:
            return False
        raise ValueError(f"{target} exists and is not {source} with {positions} positions; move it away")

    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        temporary.chmod(0o755)
        for entry in source.iterdir():
            if entry.name != "config.json":
                (temporary / entry.name).symlink_to(entry.resolve())
        (temporary / "config.json").write_text(json.dumps(extended, indent=2) + "\n", encoding="utf-8")
        os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary)
        raise
    return True


def main() -> None:
    parser = argparse.ArgumentParser(prog="python3 -m slime_fipo.recipes.extend_context", description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--positions", type=int, required=True, help="max_position_embeddings of the target")
    args = parser.parse_args()
    try:
        written = extend_context(args.source, args.target, args.positions)
    except (ValueError, OSError) as error:
        sys.exit(f"extend_context: {error}")
    print(f"{args.target}: {args.positions} positions{'' if written else ' (was there)'}")


if __name__ == "__main__":
    main()
