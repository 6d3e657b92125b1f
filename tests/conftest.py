"""Settings that must stand before the first import of torch or triton, for every test."""

import os

import torch

# Without a GPU the kernel's tests run in Triton's interpreter, which reads this when a kernel is defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(min(2, torch.get_num_threads()))
