"""``python -m tests.whole.model OUT DTYPE``: a small random Qwen3 over the sums' alphabet, by the demo's own export."""

import json
import sys
from pathlib import Path

import torch

from slime_fipo.local import engine
from slime_fipo.local.arguments import parse_arguments
from slime_fipo.local.checkpoint import checkpoint_files
from slime_fipo.rehearsal.qwen3 import export, model_flags

SIZES = "--num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --kv-channels 16 --num-threads 1"


def main(out: str, dtype: str) -> None:
    run = Path(out).with_name(f"{Path(out).name}-run")
    argv = [*SIZES.split(), "--demo-steps", "0", "--num-rollout", "0", "--save", str(run)]
    engine.main(argv)
    args = parse_arguments(argv)
    export(checkpoint_files(run / "checkpoints")[0], Path(out), args, getattr(torch, dtype))
    Path(out, "model_flags.json").write_text(json.dumps(model_flags(args)))


def slime_model_flags(model: Path) -> list[str]:
    return json.loads((model / "model_flags.json").read_text())


if __name__ == "__main__":
    main(*sys.argv[1:])
