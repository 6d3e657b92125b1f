#!/bin/bash
# FIPO on Qwen3.5-27B, two nodes of 8×80 GB.
# LOSS=policy_loss: the DAPO baseline. DRY_RUN=1 prints the command, REHEARSE=1 tries it on a CPU. Others: common.sh.
set -euo pipefail
SCRIPT_DIR="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"

MODEL="${MODEL:-Qwen3.5-27B}"
NUM_NODES="${NUM_NODES:-2}"

# TP 4 (there are 4 key-value heads) × PP 2: 27 B × (6 / 8 + 12 / 16) bytes = 41 GB; CP 2 halves what a sequence adds to
# it. SGLang: 54 GB of weights, two GPUs per engine.
TP="${TP:-4}"
PP="${PP:-2}"
CP="${CP:-2}"
ROLLOUT_GPUS_PER_ENGINE="${ROLLOUT_GPUS_PER_ENGINE:-2}"
MAX_TOKENS_PER_GPU="${MAX_TOKENS_PER_GPU:-8192}"

# The paper's settings for 32B: weights in [1.0, 1.2], safety threshold 10.
FIPO_ARGS=(--fipo-preset 32b)

# shellcheck source=scripts/models/qwen3.5-27B.sh
source "${SCRIPT_DIR}/../../scripts/models/qwen3.5-27B.sh"
MODEL_ARGS+=(--no-rope-fusion)  # only a part of each head is rotated, which the fused kernel does not do
# shellcheck source=examples/fipo/common.sh
source "${SCRIPT_DIR}/common.sh"
launch "$@"
