#!/bin/bash
# FIPO on Qwen3.5-2B-Base, one node with 8 GPUs: 32 prompts x 16 samples per rollout, 8 optimizer steps.
# LOSS=policy_loss runs the same without FIPO. Needs a running Ray on this node, or starts one and leaves it running.
set -euo pipefail

SCRIPT_DIR="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
source "${SCRIPT_DIR}/models/qwen3.5-2B.sh"

MODELS="${MODELS:-/root/models}"
DATASETS="${DATASETS:-/root/datasets}"
SAVE="${SAVE:-${MODELS}/Qwen3.5-2B-Base_fipo}"
MEGATRON="${MEGATRON:-/root/Megatron-LM}"
NUM_GPUS="${NUM_GPUS:-8}"
LOSS="${LOSS:-fipo_loss}"

CKPT_ARGS=(
   --hf-checkpoint "${MODELS}/Qwen3.5-2B-Base"
   --ref-load "${MODELS}/Qwen3.5-2B-Base_torch_dist"
   --load "${SAVE}"
   --save "${SAVE}"
   --save-interval 20
)

ROLLOUT_ARGS=(
   --prompt-data "${DATASETS}/dapo-math-17k/dapo-math-17k.jsonl"
   --input-key prompt
   --label-key label
   --apply-chat-template
   --rollout-shuffle
   --rm-type dapo
   --reward-key score
   --num-rollout 500
   --rollout-batch-size 32
   --n-samples-per-prompt 16
   --rollout-max-response-len 10240
   --rollout-temperature 1.0

   # FIPO needs several steps per rollout: 32 * 16 / 64 = 8
   --global-batch-size 64
   --balance-data
   --over-sampling-batch-size 64
   --dynamic-sampling-filter-path slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std
)

EVAL_ARGS=(
   --eval-interval 20
   --eval-prompt-data aime "${DATASETS}/aime-2024/aime-2024.jsonl"
   --n-samples-per-eval-prompt 16
   --eval-max-response-len 10240
   --eval-top-p 0.7
)

LOSS_ARGS=(
   --loss-type "${LOSS}"
   --advantage-estimator grpo
   --calculate-per-token-loss
   --entropy-coef 0.0
   --eps-clip 0.2
   --eps-clip-high 0.28
)
if [[ "${LOSS}" == fipo_loss ]]; then
   LOSS_ARGS+=(
      --fipo-decay-rate 32
      --fipo-clip-ratio-low 0.2
      --fipo-clip-ratio-high 0.28
      --fipo-safety-thresh 3.0
   )
fi

OPTIMIZER_ARGS=(
   --optimizer adam
   --lr 1e-6
   --lr-decay-style constant
   --weight-decay 0.1
   --adam-beta1 0.9
   --adam-beta2 0.98
   --clip-grad 1.0
)

PERF_ARGS=(
   --tensor-model-parallel-size 2
   --sequence-parallel
   --recompute-granularity full
   --recompute-method uniform
   --recompute-num-layers 1
   --use-dynamic-batch-size
   --max-tokens-per-gpu 12288
)

SGLANG_ARGS=(
   --rollout-num-gpus-per-engine 1
   --sglang-mem-fraction-static 0.7
)

MISC_ARGS=(
   --no-rope-fusion
   --attention-dropout 0.0
   --hidden-dropout 0.0
   --accumulate-allreduce-grads-in-fp32
   --attention-softmax-in-fp32
   --attention-backend flash
)

export MASTER_ADDR="${MASTER_ADDR:-127.0.0.1}"
if ! ray status --address "${MASTER_ADDR}:6379" >/dev/null 2>&1; then
   ray start --head --node-ip-address "${MASTER_ADDR}" --num-gpus "${NUM_GPUS}" --disable-usage-stats
fi

RUNTIME_ENV_JSON="{\"env_vars\": {\"PYTHONPATH\": \"${MEGATRON}\", \"CUDA_DEVICE_MAX_CONNECTIONS\": \"1\"}}"
ray job submit --address="http://127.0.0.1:8265" --runtime-env-json="${RUNTIME_ENV_JSON}" \
   -- python3 "${SCRIPT_DIR}/../train.py" \
   --actor-num-nodes 1 \
   --actor-num-gpus-per-node "${NUM_GPUS}" \
   --colocate \
   "${MODEL_ARGS[@]}" \
   "${CKPT_ARGS[@]}" \
   "${ROLLOUT_ARGS[@]}" \
   "${EVAL_ARGS[@]}" \
   "${LOSS_ARGS[@]}" \
   "${OPTIMIZER_ARGS[@]}" \
   "${PERF_ARGS[@]}" \
   "${SGLANG_ARGS[@]}" \
   "${MISC_ARGS[@]}"
