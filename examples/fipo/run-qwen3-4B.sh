#!/bin/bash
# FIPO on Qwen3-4B-Base, one node of 8×80 GB.
# LOSS=policy_loss: the DAPO baseline. DRY_RUN=1 prints the command, REHEARSE=1 tries it on a CPU. Others: common.sh.
set -euo pipefail
SCRIPT_DIR="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"

MODEL="${MODEL:-Qwen3-4B-Base}"

# TP 2: weights and fp32 gradients 4.0 B × 6 bytes / 2 = 12 GB, optimizer 4.0 B × 12 / 8 = 6 GB, and a full 12,288-token
# sequence's logits in fp32, three times over, 12,288 × 152k × 4 × 3 / 2 = 11 GB. It fits one GPU pair, so no CP.
# SGLang: 8 GB of weights, one GPU per engine.
TP="${TP:-2}"
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

# shellcheck source=scripts/models/qwen3-4B.sh
source "${SCRIPT_DIR}/../../scripts/models/qwen3-4B.sh"
# shellcheck source=examples/fipo/common.sh
source "${SCRIPT_DIR}/common.sh"
launch "$@"
