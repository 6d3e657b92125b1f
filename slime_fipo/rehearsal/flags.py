"""The flags of slime, Megatron-LM and SGLang that a machine without a GPU needs, and why.

They choose what these three offer; what they offer no flag for is in ``megatron_on_cpu.py`` and ``site/``.
"""

from __future__ import annotations

MEGATRON_FLAGS = [
    # Transformer Engine, Apex and flash-attention have no CPU build.
    *("--transformer-impl", "local", "--spec", "slime_fipo.rehearsal.layer_spec", "layer_spec"),
    *("--attention-backend", "unfused", "--distributed-backend", "gloo"),
    *("--no-persist-layer-norm", "--no-gradient-accumulation-fusion", "--no-rope-fusion"),
    *("--no-bias-swiglu-fusion", "--no-bias-dropout-fusion", "--no-masked-softmax-fusion"),
    # Read under context parallelism alone; the default asks for Transformer Engine.
    *("--cp-comm-type", "all_gather"),
]

SGLANG_FLAGS = [
    *("--sglang-device", "cpu", "--sglang-attention-backend", "torch_native"),
    *("--sglang-sampling-backend", "pytorch", "--sglang-disable-cuda-graph"),
    # By default SGLang takes most of the machine's memory for its KV cache.
    *("--sglang-max-total-tokens", "60000", "--sglang-mem-fraction-static", "0.1"),
    *("--rollout-num-gpus-per-engine", "1"),
]
