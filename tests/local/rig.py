"""A run small enough for a test, in this process or in one of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
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

# Smaller still, where many runs are needed and what they learn does not matter. Some responses are right by chance.
MICRO = """--num-threads 1 --num-layers 1 --hidden-size 16 --ffn-hidden-size 16 --num-attention-heads 2
    --num-query-groups 1 --kv-channels 8 --demo-steps 3 --demo-batch-size 4 --num-rollout 2 --rollout-batch-size 2
    --n-samples-per-prompt 4 --global-batch-size 4 --eval-interval 1 --rollout-max-response-len 6
    --n-samples-per-eval-prompt 1 --no-dynamic-sampling"""


def micro_flags(folder: Path) -> list[str]:
    """``MICRO`` with a data file of its own in ``folder``."""
    data = folder / "micro.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i}=", "label": ""}) + "\n" for i in range(4)))
    return [*MICRO.split(), "--prompt-data", str(data), "--eval-prompt-data", "micro", str(data)]


def tiny_args(*more: str):
    return parse_arguments([*TINY.split(), *more])


def tiny_model(args):
    """An untrained model and its alphabet. ``--init-method-std`` decides how far its distribution is from uniform."""
    initialize_megatron(CPU, args.num_threads)
    alphabet = Alphabet(args.alphabet)
    return build_model(args, alphabet.size, 64, CPU), alphabet


@dataclass
class Result:
    returncode: int
    stdout: str
    stderr: str


class Commands:
    """Runs ``slime-fipo ARGV``, each in a process of its own that can be killed.

    The processes are forked from one that has imported everything, because importing takes longer than a tiny run.
    """

    def __init__(self, scratch: Path):
        self.scratch = scratch
        self.parent = subprocess.Popen(
            [sys.executable, "-c", "from tests.local.rig import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).parents[2],
        )

    def __call__(self, *argv: str, code: str = "", check: bool = True) -> Result:
        """``code`` runs before the command, in its process."""
        out, err = self.scratch / "stdout", self.scratch / "stderr"
        print(json.dumps([argv, code, str(out), str(err)]), file=self.parent.stdin, flush=True)
        result = Result(int(self.parent.stdout.readline()), out.read_text(), err.read_text())
        assert not check or result.returncode == 0, result.stderr
        return result

    def close(self) -> None:
        self.parent.stdin.close()
        self.parent.wait()


def serve() -> None:
    """The forking side of :class:`Commands`: one JSON line per command in, its exit status out."""
    import slime_fipo.local.engine  # noqa: F401
    from slime_fipo.cli import app

    for line in sys.stdin:
        argv, code, out, err = json.loads(line)
        child = os.fork()
        if child == 0:
            for file, descriptor in ((out, 1), (err, 2)):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
            exec(code, {})
            sys.argv[:] = ["slime-fipo", *argv]
            app()
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def metrics_without_times(directory: Path) -> list[dict]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("perf/")} for line in lines]
