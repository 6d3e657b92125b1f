"""Runs train commands through slime's real parser, in this process and forks of it: ``main`` reads and writes JSON.

One interpreter loads what takes seconds (Megatron's arguments, SGLang's), and forks for every case; the fork then
imports slime and runs ``python script …`` or ``python -m slime_fipo script …`` the way the interpreter does. It needs
no GPU and takes none. What the outcomes mean for a command is ``slime_parser``'s to say.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import runpy
import sys
import tempfile
import traceback
from typing import Any

# What slime's train.py does first; the namespace is written out.
PARSE_ONLY = """
import json
import os

from slime.utils.arguments import parse_args

if __name__ == "__main__":
    args = parse_args()
    with open(os.environ["PARSED"], "w") as file:
        json.dump({name: repr(value) for name, value in sorted(vars(args).items())}, file)
"""
HOPPER = (9, 0)
FORK_FAILED = 71
# What slime's image has and a machine without a GPU mostly does not.
GPU_PACKAGES = ("apex", "flash_attn", "modelopt", "nvidia_resiliency_ext", "transformer_engine")


def load() -> None:
    """Import what every fork needs, and answer for the GPU that is not there."""
    import megatron.training.arguments
    import megatron.training.utils
    import sglang.srt.server_args  # noqa: F401
    import torch
    import transformers

    # Megatron asks for the GPU's architecture with tensor or context parallelism, and with experts.
    megatron.training.utils.get_device_arch_version = lambda: HOPPER[0]
    megatron.training.arguments.get_device_arch_version = lambda: HOPPER[0]
    torch.cuda.get_device_capability = lambda *_: HOPPER

    # slime trusts the checkpoint's own code; a look at the command's flags need not run it.
    from_pretrained = transformers.AutoConfig.from_pretrained
    transformers.AutoConfig.from_pretrained = lambda *args, **options: from_pretrained(
        *args, **{**options, "trust_remote_code": False}
    )


class _Word(str):
    """A word of the command line with an identity: Python keeps one object for equal short texts."""


class _Ignored:
    """The words of ``sys.argv`` that none of the parsers which read it took."""

    def __init__(self) -> None:
        self.left: set[int] | None = None  # ids: the same text may stand there twice
        original = argparse.ArgumentParser.parse_known_args

        def parse_known_args(parser, args=None, namespace=None):
            namespace, extras = original(parser, args, namespace)
            if args is None:
                mine = {id(word) for word in extras}
                self.left = mine if self.left is None else self.left & mine
            return namespace, extras

        argparse.ArgumentParser.parse_known_args = parse_known_args

    def positions(self) -> list[int]:
        return [i for i, word in enumerate(sys.argv[1:]) if id(word) in (self.left or ())]


def _described(error: BaseException) -> dict[str, Any]:
    frames = traceback.extract_tb(error.__traceback__)
    return {
        "types": [kind.__name__ for kind in type(error).__mro__],
        "message": str(error),
        "frames": [[frame.filename, frame.name, frame.line or ""] for frame in frames],
    }


def _run_in_fork(case: dict[str, Any], own_script: str, parsed: str, report: str) -> None:
    os.environ["PARSED"] = parsed
    ignored, error, status = _Ignored(), None, 70
    try:
        script = case.get("script") or own_script
        sys.path.insert(0, os.path.dirname(script))
        arguments = [_Word(word) for word in case["arguments"]]
        if case["wrapper"]:
            sys.argv = ["slime_fipo", script, *arguments]
            runpy.run_module("slime_fipo", run_name="__main__", alter_sys=True)
        else:
            sys.argv = [script, *arguments]
            runpy.run_path(script, run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as problem:
        sys.excepthook(*sys.exc_info())
        status, error = 1, _described(problem)
    with open(report, "w") as file:
        started = ignored.left is not None
        json.dump({"status": status, "started": started, "error": error, "ignored": ignored.positions()}, file)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Outcome of one case, run in a fork.

    Args:
        case: ``arguments``; ``wrapper``, whether ``python3 -m slime_fipo`` runs the script; ``script``, by default one
            that only parses.

    Returns:
        ``status`` and ``output`` of the run; ``namespace``: name to repr, None if the parser refused; ``started``:
        whether a parser got to see the arguments; ``error``: the exception, if it was no exit; ``ignored``: positions
        of the arguments that no parser took.
    """
    with tempfile.TemporaryDirectory() as directory:
        names = ("parse_only.py", "output", "parsed", "report")
        own_script, output, parsed, report = (os.path.join(directory, name) for name in names)
        with open(own_script, "w") as file:
            file.write(PARSE_ONLY)
        pid = os.fork()
        if pid == 0:
            try:
                descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
                os.dup2(descriptor, 1)
                os.dup2(descriptor, 2)
                _run_in_fork(case, own_script, parsed, report)
            finally:
                os._exit(FORK_FAILED)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        result = {"status": status, "started": False, "error": None, "ignored": [], "namespace": None}
        if os.path.exists(report):
            with open(report) as file:
                result.update(json.load(file))
        if os.path.exists(parsed):
            with open(parsed) as file:
                result["namespace"] = json.load(file)
        with open(output, errors="replace") as file:
            result["output"] = file.read()
    return result


def main() -> None:
    """``sys.argv``: a file of cases by name, for :func:`run`, and the file to write the outcomes to."""
    with open(sys.argv[1]) as file:
        cases = json.load(file)
    out: dict[str, Any] = {"missing": [name for name in GPU_PACKAGES if importlib.util.find_spec(name) is None]}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        out["sglang"] = importlib.metadata.version("sglang")
    try:
        load()
    except BaseException as problem:  # whatever a foreign package raises when it is imported
        out["unavailable"] = _described(problem)
    else:
        out["cases"] = {name: run(case) for name, case in cases.items()}
    with open(sys.argv[2], "w") as file:
        json.dump(out, file)
