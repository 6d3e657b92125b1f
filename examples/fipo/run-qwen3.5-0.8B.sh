#!/bin/bash
# FIPO on Qwen3.5-0.8B-Base, one node of 8×80 GB.
# LOSS=policy_loss: the DAPO baseline. DRY_RUN=1 prints the command, REHEARSE=1 tries it on a CPU. Others: common.sh.
set -euo pipefail
SCRIPT_DIR="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"

MODEL="${MODEL:-Qwen3.5-0.8B-Base}"

# TP 1: weights, gradients and optimizer 0.8 B × (6 + 12 / 8) bytes = 6 GB; the logits over a vocabulary of 248k are what
# counts, 12,288 × 248k × 4 bytes × 3 = 37 GB for a full sequence. SGLang: one GPU per engine.
TP="${TP:-1}"
CP="${CP:-1}"
ROLLOUT_GPUS_PER_ENGINE="${ROLLOUT_GPUS_PER_ENGINE:-1}"
MAX_TOKENS_PER_GPU="${MAX_TOKENS_PER_GPU:-12288}"

# The settings published with slime's FIPO pull request for 2B and 4B base models, on 8 GPUs.
FIPO_ARGS=(
   --fipo-decay-rate 32.0
   --fipo-clip-ratio-low 0.2
   --fipo-clip-ratio-high 0.28
   --fipo-safety-thresh 3.0
   --fipo-dual-clip-c 10.0
)

# shellcheck source=scripts/models/qwen3.5-0.8B.sh
source "${SCRIPT_DIR}/../../scripts/models/qwen3.5-0.8B.sh"
MODEL_ARGS+=(--no-rope-fusion)  # only a part of each head is rotated, which the fused kernel does not do
# shellcheck source=examples/fipo/common.sh
source "${SCRIPT_DIR}/common.sh"
launch "$@"
