"""Whether what a command names by import path can be imported, before slime starts: in seconds, not after a minute.

``python -m slime_fipo.rehearsal.hook_imports OUT PATH…`` is the process that imports; it runs the user's modules with
the stand-ins and the job's PYTHONPATH, as slime's processes do.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

TIME_LIMIT_S = 120.0


def import_errors(paths: Iterable[str], environment: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Import path -> why slime will not be able to load it; those that can be loaded are left out.

    All are left out where the process does not end well: slime, which loads them later, then says why.

    Args:
        environment: of the process that imports.
        folder: gets a file with what it says.
    """
    paths, out = list(paths), folder / "hooks.json"
    if not paths:
        return {}
    with (folder / "hooks.log").open("wb") as log:
        command = [sys.executable, "-m", __name__, str(out), *paths]
        try:
            subprocess.run(command, env=dict(environment), stdout=log, stderr=log, timeout=TIME_LIMIT_S)
        except subprocess.TimeoutExpired:
            return {}  # slime may have more patience
    return json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}


def _error(path: str) -> str | None:
    module, _, name = path.rpartition(".")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and module.partition(".")[0] == error.name.partition(".")[0]:
            return f"there is no module {error.name} here; add its folder to PYTHONPATH, or correct the path"
        return f"its module cannot be imported: {error}"
    except (Exception, SystemExit) as error:  # a module raises whatever its author wrote
        return f"its module cannot be imported: {type(error).__name__}: {error}"
    return None if hasattr(found, name) else f"{found.__file__} has no {name}; correct the name"


def main(out: str, *paths: str) -> None:
    errors = {path: error for path in paths if (error := _error(path))}
    temporary = Path(f"{out}.tmp")
    temporary.write_text(json.dumps(errors), encoding="utf-8")
    os.replace(temporary, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
