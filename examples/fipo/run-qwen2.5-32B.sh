#!/bin/bash
# The paper's 32B run (Table 2): FIPO on Qwen2.5-32B, 16 nodes of 8×80 GB.
# LOSS=policy_loss: the DAPO baseline. DRY_RUN=1 prints the command, REHEARSE=1 tries it on a CPU. Others: common.sh.
set -euo pipefail
SCRIPT_DIR="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"

MODEL="${MODEL:-Qwen2.5-32B}"
NUM_NODES="${NUM_NODES:-16}"
# The paper takes the old log-probs from the trainer.
LOGPROBS="${LOGPROBS:-train}"

# Table 2; the baseline has a mini-batch of 32 prompts (which FIPO is not stable with, App. F).
ROLLOUT_BATCH_SIZE="${ROLLOUT_BATCH_SIZE:-512}"
OVER_SAMPLING_BATCH_SIZE="${OVER_SAMPLING_BATCH_SIZE:-2048}"
N_SAMPLES_PER_PROMPT="${N_SAMPLES_PER_PROMPT:-16}"
if [[ ${LOSS:-fipo_loss} == policy_loss ]]; then
   GLOBAL_BATCH_SIZE="${GLOBAL_BATCH_SIZE:-512}"
else
   GLOBAL_BATCH_SIZE="${GLOBAL_BATCH_SIZE:-1024}"
fi
MAX_RESPONSE_LEN="${MAX_RESPONSE_LEN:-20480}"
OVERLONG_BUFFER_LEN="${OVERLONG_BUFFER_LEN:-4096}"

# A rollout takes ten minutes to half an hour, so fewer of them may be lost than with the smaller models.
SAVE_INTERVAL="${SAVE_INTERVAL:-10}"

# TP 8: 32.5 B × (6 / 8 + 12 / 128) bytes = 27 GB, logits 22,528 × 152k × 4 × 3 / 8 = 5 GB for a full sequence. That fits
# one node, so CP would only add traffic. SGLang: 65 GB of weights and 5.9 GB of KV cache per full sequence, four GPUs
# per engine.
TP="${TP:-8}"
CP="${CP:-1}"
ROLLOUT_GPUS_PER_ENGINE="${ROLLOUT_GPUS_PER_ENGINE:-4}"
MAX_TOKENS_PER_GPU="${MAX_TOKENS_PER_GPU:-22528}"

# Weights in [1.0, 1.2], safety threshold 10.
FIPO_ARGS=(--fipo-preset 32b)

# shellcheck source=scripts/models/qwen2.5-32B.sh
source "${SCRIPT_DIR}/../../scripts/models/qwen2.5-32B.sh"
# shellcheck source=examples/fipo/common.sh
source "${SCRIPT_DIR}/common.sh"
launch "$@"
