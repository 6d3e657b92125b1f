"""slime's own side of FIPO's settings: ``python -m tests.slime.settings_rig CASES.json OUT.json``.

Writes the option strings of slime's, Megatron's and SGLang's real parsers, and what slime's real
``parse_megatron_role_args`` makes of each case's namespace and file.
"""

import argparse
import json
import sys

from megatron.training.arguments import add_megatron_arguments
from slime.utils import arguments as slime_arguments


def option_strings() -> list[str]:
    parser = slime_arguments.get_slime_extra_args_provider()(add_megatron_arguments(argparse.ArgumentParser()))
    parsers = [parser, sglang_parser()]
    return sorted({option for p in parsers if p is not None for a in p._actions for option in a.option_strings})


def sglang_parser() -> argparse.ArgumentParser | None:
    from slime.backends.sglang_utils.arguments import add_sglang_arguments

    try:
        return add_sglang_arguments(argparse.ArgumentParser())
    except Exception:  # v0.3.0 needs an SGLang older than the installed one
        return None


def main() -> None:
    with open(sys.argv[1]) as file:
        cases = json.load(file)
    actors = [
        vars(slime_arguments.parse_megatron_role_args(argparse.Namespace(**case["args"]), case["path"], role="actor"))
        for case in cases
    ]
    with open(sys.argv[2], "w") as file:
        json.dump({"options": option_strings(), "actors": actors}, file)


if __name__ == "__main__":
    main()
