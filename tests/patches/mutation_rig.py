"""Runs slime's new test file on a patched slime, once per mutation.

``python -m tests.patches.mutation_rig TREE IN OUT``.
``IN`` maps a mutation's name to the file it is in and that file's text; ``OUT`` gets pytest's exit status and output
of each. The slow imports happen once, and every run is a fork. The processes of the context-parallel test import
everything anew, so it only runs for mutations that the other tests do not notice.
"""

import importlib
import json
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch


def run(tree: Path, only: str = "not 2") -> dict:
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if child == 0:
            status = 70
            try:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                options = ["-x", "-q", "-p", "no:cacheprovider", "-k", only]
                status = int(pytest.main([*options, "tests/test_fipo_loss.py"]))
                sys.stdout.flush()
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        return {"status": status, "output": output.read().decode(errors="replace")}


def import_what_is_slow(tree: Path) -> None:
    """All that the tests import but slime itself."""
    importlib.import_module("test_fipo_loss")
    of_the_tree = {"slime", "megatron", *(path.stem for path in (tree / "tests").glob("*.py"))}
    for name in list(sys.modules):
        if name.partition(".")[0] in of_the_tree:
            del sys.modules[name]


def main() -> None:
    tree, mutations, out = (Path(argument).resolve() for argument in sys.argv[1:])
    os.chdir(tree)
    sys.path[:0] = [str(tree / "tests"), str(tree)]
    sys.dont_write_bytecode = True
    torch.set_num_threads(1)
    import_what_is_slow(tree)
    results = {"": run(tree)}
    for name, (file, text) in json.loads(mutations.read_text()).items():
        before = (tree / file).read_text()
        (tree / file).write_text(text)
        results[name] = run(tree)
        if results[name]["status"] == 0:
            results[name] = run(tree, "2")
        (tree / file).write_text(before)
    out.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
