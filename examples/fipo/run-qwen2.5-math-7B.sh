#!/bin/bash
# The paper's 7B run (App. B.2): FIPO on Qwen2.5-Math-7B, one node of 8×80 GB.
# LOSS=policy_loss: the DAPO baseline. DRY_RUN=1 prints the command, REHEARSE=1 tries it on a CPU. Others: common.sh.
set -euo pipefail
SCRIPT_DIR="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"

MODEL="${MODEL:-Qwen2.5-Math-7B-32k}"
REF_LOAD="${REF_LOAD:-${MODEL_ROOT:-/root}/Qwen2.5-Math-7B_torch_dist}"  # weights know no context length
# The paper takes the old log-probs from the trainer.
LOGPROBS="${LOGPROBS:-train}"

# Table 2; the baseline has its own mini-batch (32 prompts), group size and lengths.
ROLLOUT_BATCH_SIZE="${ROLLOUT_BATCH_SIZE:-512}"
OVER_SAMPLING_BATCH_SIZE="${OVER_SAMPLING_BATCH_SIZE:-2048}"
if [[ ${LOSS:-fipo_loss} == policy_loss ]]; then
   N_SAMPLES_PER_PROMPT="${N_SAMPLES_PER_PROMPT:-16}"
   GLOBAL_BATCH_SIZE="${GLOBAL_BATCH_SIZE:-512}"
   MAX_RESPONSE_LEN="${MAX_RESPONSE_LEN:-8192}"
   OVERLONG_BUFFER_LEN="${OVERLONG_BUFFER_LEN:-4096}"
else
   N_SAMPLES_PER_PROMPT="${N_SAMPLES_PER_PROMPT:-32}"
   GLOBAL_BATCH_SIZE="${GLOBAL_BATCH_SIZE:-2048}"
   MAX_RESPONSE_LEN="${MAX_RESPONSE_LEN:-10240}"
   OVERLONG_BUFFER_LEN="${OVERLONG_BUFFER_LEN:-2048}"
fi

# A rollout takes ten minutes to half an hour, so fewer of them may be lost than with the smaller models.
SAVE_INTERVAL="${SAVE_INTERVAL:-10}"

# TP 2: 7.6 B × (6 / 2 + 12 / 8) bytes = 34 GB, logits 12,288 × 152k × 4 × 3 / 2 = 11 GB for a full sequence, so no CP.
# SGLang: 15 GB of weights, one GPU per engine.
TP="${TP:-2}"
CP="${CP:-1}"
ROLLOUT_GPUS_PER_ENGINE="${ROLLOUT_GPUS_PER_ENGINE:-1}"
MAX_TOKENS_PER_GPU="${MAX_TOKENS_PER_GPU:-12288}"

# Weights in [0.8, 1.2], safety threshold 3.
FIPO_ARGS=(--fipo-preset 7b)

# shellcheck source=scripts/models/qwen2.5-math-7B.sh
source "${SCRIPT_DIR}/../../scripts/models/qwen2.5-math-7B.sh"
# slime v0.3 sets the positions to the sequence length, a placeholder otherwise.
MODEL_ARGS+=(--seq-length 32768 --max-position-embeddings 32768)
# shellcheck source=examples/fipo/common.sh
source "${SCRIPT_DIR}/common.sh"

# Qwen2.5-Math-7B declares 4,096 positions. The run uses a copy that declares 32,768: linked weights, a new config.json.
BASE_CHECKPOINT="${BASE_CHECKPOINT:-${MODEL_ROOT}/Qwen2.5-Math-7B}"
if [[ ${DRY_RUN:-0} != 1 ]]; then
   python3 "${FIPO_DIR}/slime_fipo/recipes/extend_context.py" "${BASE_CHECKPOINT}" "${HF_CHECKPOINT}" --positions 32768
fi
launch "$@"
