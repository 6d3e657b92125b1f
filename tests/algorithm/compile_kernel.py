"""Compiles the kernel's launches for a GPU that need not be here: ``python -m tests.algorithm.compile_kernel 90``.

A program of its own, because Triton must not have been imported with TRITON_INTERPRET=1. Prints one JSON object per
launch: its name, registers, bytes of stack, and whether it moves 16 bytes at a time.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from slime_fipo import FipoConfig
from slime_fipo.algorithm import kernel
from slime_fipo.algorithm.weights import MAX_SHIFT, METRICS


class AbsentGpu:
    """What Triton asks a driver for before it compiles."""

    def __init__(self, arch):
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


class Chunks:
    """A context-parallel rank's two chunks of one response, alone in its group."""

    def segments(self, chunks):
        return chunks.flatten()

    def exchange(self, heads, counts, *_):
        return heads, counts.to(heads.dtype)


def resource_usage(cubin: bytes) -> dict:
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([program, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text)
    return dict(zip(("registers", "stack", "local"), map(int, found.groups()), strict=True))


def main() -> None:
    driver.set_active(AbsentGpu(int(sys.argv[1])))
    assert not kernel.INTERPRETED
    for name in ("_sum_blocks", "_sum_heads", "_weigh"):
        launch = getattr(kernel, name)

        def compile_only(*args, grid, warmup, run=launch.run, name=name, **kwargs):
            compiled = run(*args, grid=grid, warmup=True, **kwargs)
            ptx = compiled.asm["ptx"]
            wide = "ld.global.v4" in ptx and (name != "_weigh" or "st.global.v4" in ptx)
            print(json.dumps({"launch": name, "wide": wide, **resource_usage(compiled.asm["cubin"])}))

        launch.run = compile_only

    tokens = 3000
    floats, lengths = torch.zeros(tokens), torch.tensor([tokens])
    batch = (floats, floats.clone(), floats.clone(), torch.ones(tokens, dtype=torch.int32))
    chunks = torch.tensor([[tokens - 700, 700]])
    trained = FipoConfig(decay_over="trained_tokens")
    kernel.kernel_weights(*batch, lengths, FipoConfig(), None, None, METRICS, MAX_SHIFT)
    kernel.kernel_weights(*batch, lengths, trained, Chunks(), chunks, METRICS, MAX_SHIFT)
    kernel.kernel_future_kl(floats, lengths, 32.0, None)


if __name__ == "__main__":
    main()
