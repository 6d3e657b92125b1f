"""A run small enough for a test, in this process or in one of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from slime_fipo.local.arguments import parse_arguments
from slime_fipo.local.data import Alphabet
from slime_fipo.local.model import build_model, initialize_megatron

CPU = torch.device("cpu")
TINY = """--num-threads 1 --num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4
    --num-query-groups 2 --kv-channels 16 --demo-steps 120 --demo-batch-size 16 --num-rollout 3 --rollout-batch-size 4
    --n-samples-per-prompt 4 --global-batch-size 4 --eval-interval 2 --rollout-max-response-len 12
    --n-samples-per-eval-prompt 1 --lr 1e-3"""


def tiny_args(*more: str):
    return parse_arguments([*TINY.split(), *more])


def tiny_model(args):
    """An untrained model and its alphabet. ``--init-method-std`` decides how far its distribution is from uniform."""
    initialize_megatron(CPU, args.num_threads)
    alphabet = Alphabet(args.alphabet)
    return build_model(args, alphabet.size, 64, CPU), alphabet


def command(*argv: str, code: str | None = None, check: bool = True) -> subprocess.CompletedProcess:
    """``slime-fipo ARGV`` in a process of its own; ``code`` runs in it first."""
    program = (code or "") + "\nfrom slime_fipo.cli import app; app()"
    result = subprocess.run(
        [sys.executable, "-c", program, *argv],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
    )
    if check:
        assert result.returncode == 0, result.stderr
    return result


def metrics_without_times(directory: Path) -> list[dict]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("perf/")} for line in lines]
