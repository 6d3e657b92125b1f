#!/bin/bash
# FIPO on Qwen3.5-9B-Base, one node of 8×80 GB.
# LOSS=policy_loss: the DAPO baseline. DRY_RUN=1 prints the command, REHEARSE=1 tries it on a CPU. Others: common.sh.
set -euo pipefail
SCRIPT_DIR="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"

MODEL="${MODEL:-Qwen3.5-9B-Base}"

# TP 2: 9 B × (6 / 2 + 12 / 8) bytes = 41 GB. CP 2 halves what a sequence adds to it: 6,144 tokens per GPU have
# 6,144 × 248k × 4 × 3 / 2 = 9 GB of logits. SGLang: 18 GB of weights, one GPU per engine.
TP="${TP:-2}"
CP="${CP:-2}"
ROLLOUT_GPUS_PER_ENGINE="${ROLLOUT_GPUS_PER_ENGINE:-1}"
MAX_TOKENS_PER_GPU="${MAX_TOKENS_PER_GPU:-6144}"

# The paper's settings for 7B: weights in [0.8, 1.2], safety threshold 3.
FIPO_ARGS=(--fipo-preset 7b)

# shellcheck source=scripts/models/qwen3.5-9B.sh
source "${SCRIPT_DIR}/../../scripts/models/qwen3.5-9B.sh"
MODEL_ARGS+=(--no-rope-fusion)  # only a part of each head is rotated, which the fused kernel does not do
# shellcheck source=examples/fipo/common.sh
source "${SCRIPT_DIR}/common.sh"
launch "$@"
