"""slime's ``train.py`` with weights in float32, which slime has no flag for."""

import runpy
from pathlib import Path

from slime.backends.megatron_utils import arguments

_set_defaults = arguments._set_default_megatron_args


def set_defaults_in_float32(args):
    args = _set_defaults(args)
    args.bf16 = False
    return args


arguments._set_default_megatron_args = set_defaults_in_float32
runpy.run_path(str(Path(arguments.__file__).parents[3] / "train.py"), run_name="__main__")
