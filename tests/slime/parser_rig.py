"""Runs train scripts through slime's real parser: ``python -m tests.slime.parser_rig CASES.json OUT.json``.

One interpreter loads what takes seconds (Megatron's arguments, SGLang's), and forks for every case; the fork then
imports slime and runs ``python script …`` or ``python -m slime_fipo script …`` the way the interpreter does.
"""

import json
import os
import runpy
import sys
import tempfile

import megatron.training.arguments
import megatron.training.utils
import transformers  # noqa: F401

# With tensor or context parallelism Megatron asks for the GPU's architecture.
megatron.training.utils.get_device_arch_version = lambda: 9
megatron.training.arguments.get_device_arch_version = lambda: 9


def run(case: dict) -> dict:
    """Exit code and output of one run in a fork, and the namespace that the script wrote, if it came to that."""
    with tempfile.TemporaryDirectory() as directory:
        output, parsed = os.path.join(directory, "output"), os.path.join(directory, "parsed.json")
        pid = os.fork()
        if pid == 0:
            descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            os.environ["PARSED"] = parsed
            status = 70
            try:
                if case["wrapper"]:
                    sys.argv = ["slime_fipo", case["script"], *case["arguments"]]
                    runpy.run_module("slime_fipo", run_name="__main__", alter_sys=True)
                else:
                    sys.argv = [case["script"], *case["arguments"]]
                    sys.path[0] = os.path.dirname(case["script"])
                    runpy.run_path(case["script"], run_name="__main__")
                status = 0
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                status = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with open(output, errors="replace") as file:
            text = file.read()
        namespace = None
        if os.path.exists(parsed):
            with open(parsed) as file:
                namespace = json.load(file)
    return {"status": status, "output": text, "namespace": namespace}


def main() -> None:
    with open(sys.argv[1]) as file:
        cases = json.load(file)
    if not all("--debug-train-only" in case["arguments"] for case in cases.values()):
        import sglang.srt.server_args  # noqa: F401
    results = {name: run(case) for name, case in cases.items()}
    with open(sys.argv[2], "w") as file:
        json.dump(results, file)


if __name__ == "__main__":
    main()
