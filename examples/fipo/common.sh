# shellcheck shell=bash
# The recipe that every training run here shares. A launch script sets what its model needs, sources a model script and
# this file, and calls `launch "$@"`; arguments are handed on to slime behind the script's own, so they win.
#
# Read from the environment, with the launch script's defaults (Ray's variables: ray_job.sh):
#   LOSS            fipo_loss, or policy_loss for the DAPO baseline
#   LOGPROBS        old log-probs: rollout (SGLang's, as sampled) or train (Megatron's, recomputed; the paper)
#   MODEL           name of the checkpoint's folder below MODEL_ROOT
#   HF_CHECKPOINT, REF_LOAD, SAVE          Hugging Face folder, Megatron folder, run folder (also resumed from)
#   MODEL_ROOT, DATA_ROOT, PROMPT_DATA, AIME24 (empty: leave the benchmark out), AIME25 (left out unless set)
#   SLIME_DIR, MEGATRON_DIR                checkouts, at the same path on every node
#   NUM_NODES, GPUS_PER_NODE, TP, PP, CP, ROLLOUT_GPUS_PER_ENGINE, MAX_TOKENS_PER_GPU, SGLANG_MEM_FRACTION
#   ROLLOUT_BATCH_SIZE, N_SAMPLES_PER_PROMPT, GLOBAL_BATCH_SIZE, OVER_SAMPLING_BATCH_SIZE, NUM_ROLLOUT
#   WARMUP_ROLLOUTS, MAX_PROMPT_LEN, MAX_RESPONSE_LEN, OVERLONG_BUFFER_LEN
#   EVAL_INTERVAL, EVAL_SAMPLES, WANDB_PROJECT (empty: no wandb)
#   SAVE_INTERVAL   rollouts between checkpoints; each holds the optimizer, 14 bytes per parameter
#   KEEP_CHECKPOINTS  newest (a checkpoint is deleted when the next one is complete, so SAVE needs room for two) or all
#   REHEARSE=1      run the command small, on this machine's CPU, and submit nothing: slime-fipo rehearse, with
#                   REHEARSAL_PYTHON (by default that of `make rehearsal-env`, else python3)
#   CHECK=0         submit without looking at this machine's checkouts, and without `slime-fipo check`
#   DRY_RUN=1       print the command and do nothing
#
# The launch script's own: FIPO_ARGS (the objective's flags) and MODEL_ARGS (scripts/models).

EXAMPLE_DIR="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
FIPO_DIR="$(cd -- "${EXAMPLE_DIR}/../.." && pwd)"
# Told to stop, a run finishes its rollout and saves, which takes minutes.
RAY_JOB_STOP_WAIT_TIME_S="${RAY_JOB_STOP_WAIT_TIME_S:-1500}"
# shellcheck source=examples/fipo/ray_job.sh
source "${EXAMPLE_DIR}/ray_job.sh"

LOSS="${LOSS:-fipo_loss}"
LOGPROBS="${LOGPROBS:-rollout}"

MODEL_ROOT="${MODEL_ROOT:-/root}"
DATA_ROOT="${DATA_ROOT:-/root}"
SLIME_DIR="${SLIME_DIR:-/root/slime}"
MEGATRON_DIR="${MEGATRON_DIR:-/root/Megatron-LM}"
HF_CHECKPOINT="${HF_CHECKPOINT:-${MODEL_ROOT}/${MODEL:?a launch script sets MODEL}}"
REF_LOAD="${REF_LOAD:-${MODEL_ROOT}/${MODEL}_torch_dist}"
SAVE="${SAVE:-${MODEL_ROOT}/${MODEL}_slime_${LOSS}}"
PROMPT_DATA="${PROMPT_DATA:-${DATA_ROOT}/dapo-math-17k/dapo-math-17k.jsonl}"
AIME24="${AIME24-${DATA_ROOT}/aime-2024/aime-2024.jsonl}"
AIME25="${AIME25:-}"

NUM_NODES="${NUM_NODES:-1}"
GPUS_PER_NODE="${GPUS_PER_NODE:-8}"
ROLLOUT_GPUS_PER_ENGINE="${ROLLOUT_GPUS_PER_ENGINE:-1}"
SGLANG_MEM_FRACTION="${SGLANG_MEM_FRACTION:-0.7}"

# 8 optimizer steps per rollout: with one, every shift is 0 and FIPO is plain DAPO.
ROLLOUT_BATCH_SIZE="${ROLLOUT_BATCH_SIZE:-32}"
N_SAMPLES_PER_PROMPT="${N_SAMPLES_PER_PROMPT:-16}"
GLOBAL_BATCH_SIZE="${GLOBAL_BATCH_SIZE:-64}"
OVER_SAMPLING_BATCH_SIZE="${OVER_SAMPLING_BATCH_SIZE:-$((2 * ROLLOUT_BATCH_SIZE))}"
NUM_ROLLOUT="${NUM_ROLLOUT:-300}"
# The paper's 10 warm-up steps are verl's, which counts rollouts; slime counts optimizer steps. At most half of a short run.
WARMUP_ROLLOUTS="${WARMUP_ROLLOUTS:-$((NUM_ROLLOUT < 20 ? NUM_ROLLOUT / 2 : 10))}"
MAX_PROMPT_LEN="${MAX_PROMPT_LEN:-2048}"
MAX_RESPONSE_LEN="${MAX_RESPONSE_LEN:-10240}"
OVERLONG_BUFFER_LEN="${OVERLONG_BUFFER_LEN:-2048}"
EVAL_INTERVAL="${EVAL_INTERVAL:-5}"
EVAL_SAMPLES="${EVAL_SAMPLES:-32}"
SAVE_INTERVAL="${SAVE_INTERVAL:-20}"
KEEP_CHECKPOINTS="${KEEP_CHECKPOINTS:-newest}"

# require_checkouts: ends the script where this machine lacks what the run imports
require_checkouts() {
   local missing
   if [[ ! -f ${SLIME_DIR}/train.py ]]; then
      echo "no slime in ${SLIME_DIR}: set SLIME_DIR to a checkout of https://github.com/THUDM/slime" >&2
      exit 2
   fi
   if [[ ! -d ${MEGATRON_DIR}/megatron/training ]]; then
      echo "no Megatron-LM in ${MEGATRON_DIR}: set MEGATRON_DIR to the checkout that slime's Dockerfile names" >&2
      exit 2
   fi
   missing="$(python3 -c 'import sys; from importlib.util import find_spec as found; print(*(m for m in sys.argv[1:] if not found(m)))' \
      torch numpy yaml safetensors jinja2 typer rich)"
   if [[ -n ${missing} ]]; then
      echo "$(command -v python3) has no ${missing// /, }: pip install ${FIPO_DIR}" >&2
      exit 2
   fi
}

# value_of FLAG WORD...: the word behind a flag; nothing where it is not given
value_of() {
   local flag="$1"
   shift
   while [[ $# -gt 0 && $1 != "${flag}" ]]; do shift; done
   echo "${2:-}"
}

# rehearse TRAIN COMMAND: runs it small on this machine's CPU; DRY_RUN=1 prints how
rehearse() {
   local python="${REHEARSAL_PYTHON:-${FIPO_DIR}/.venv-whole/bin/python}"
   [[ -n ${REHEARSAL_PYTHON:-} || -x ${python} ]] || python=python3
   local -a command=(
      env "PYTHONPATH=${FIPO_DIR}${PYTHONPATH:+:${PYTHONPATH}}"
      "${python}" -m slime_fipo.cli rehearse --slime-root "${SLIME_DIR}" --megatron-root "${MEGATRON_DIR}" -- "$@"
   )
   if [[ ${DRY_RUN:-0} == 1 ]]; then
      quoted "${command[@]}"
   else
      "${command[@]}"
   fi
}

launch() {
   local argument
   local -a loss_args eval_data=() wandb_args=()

   case "${LOSS}" in
      fipo_loss) loss_args=(--loss-type fipo_loss "${FIPO_ARGS[@]}") ;;
      # FIPO sets the dual clip with its own flag (10 by default); slime's flag is the baseline's.
      policy_loss) loss_args=(--loss-type policy_loss --eps-clip-c 10.0) ;;
      *) echo "LOSS is ${LOSS}; it must be fipo_loss or policy_loss" >&2; return 2 ;;
   esac
   case "${LOGPROBS}" in
      rollout) loss_args+=(--use-rollout-logprobs) ;;
      train) ;;
      *) echo "LOGPROBS is ${LOGPROBS}; it must be rollout or train" >&2; return 2 ;;
   esac
   local -a keep_args=()
   case "${KEEP_CHECKPOINTS}" in
      all) ;;
      newest)
         for argument in "$@"; do
            if [[ ${argument} == --save-interval* ]]; then
               echo "set SAVE_INTERVAL in place of ${argument}: what KEEP_CHECKPOINTS=newest passes depends on it" >&2
               return 2
            fi
         done
         # Megatron keeps the newest checkpoint and those whose number is a multiple of this. slime numbers by rollout,
         # from 0, so all are smaller.
         keep_args=(--save-retain-interval "$((SAVE_INTERVAL * (NUM_ROLLOUT + 1)))")
         ;;
      *) echo "KEEP_CHECKPOINTS is ${KEEP_CHECKPOINTS}; it must be newest or all" >&2; return 2 ;;
   esac
   if [[ ${DRY_RUN:-0} != 1 && ${REHEARSE:-0} != 1 && -z ${RAY_ADDRESS:-} && ${NUM_NODES} -gt 1 ]]; then
      echo "this run takes ${NUM_NODES} nodes: set RAY_ADDRESS to their Ray cluster, or submit it with slurm/fipo.sbatch" >&2
      return 2
   fi

   [[ -z ${AIME24} ]] || eval_data+=(aime24 "${AIME24}")
   [[ -z ${AIME25} ]] || eval_data+=(aime25 "${AIME25}")
   [[ -z ${WANDB_PROJECT:-} ]] || wandb_args=(
      --use-wandb
      --wandb-project "${WANDB_PROJECT}"
      --wandb-group "$(basename -- "${SAVE}")"
      # a continued run is a new one in W&B: of the same name, and in the same group
      --disable-wandb-random-suffix
   )

   local -a ckpt_args=(
      --hf-checkpoint "${HF_CHECKPOINT}"
      --ref-load "${REF_LOAD}"
      # the same folder twice: the same command again continues the run
      --load "${SAVE}"
      --save "${SAVE}"
      --save-interval "${SAVE_INTERVAL}"
      "${keep_args[@]}"
   )
   local -a rollout_args=(
      --prompt-data "${PROMPT_DATA}"
      --input-key prompt
      --label-key label
      --apply-chat-template
      --rollout-shuffle
      --num-rollout "${NUM_ROLLOUT}"
      --rollout-batch-size "${ROLLOUT_BATCH_SIZE}"
      --n-samples-per-prompt "${N_SAMPLES_PER_PROMPT}"
      --global-batch-size "${GLOBAL_BATCH_SIZE}"
      --over-sampling-batch-size "${OVER_SAMPLING_BATCH_SIZE}"
      --rollout-max-prompt-len "${MAX_PROMPT_LEN}"
      --rollout-max-response-len "${MAX_RESPONSE_LEN}"
      --rollout-temperature 1.0
      --rollout-top-p 1.0
      --balance-data
   )
   local -a reward_args=(
      --custom-rm-path slime_fipo.recipes.reward.dapo_math_reward
      --reward-key score
      --eval-reward-key acc
      --overlong-buffer-len "${OVERLONG_BUFFER_LEN}"
      --overlong-penalty-factor 1.0
      # groups are kept for their answers, not for the penalty's spread
      --dynamic-sampling-filter-path slime_fipo.recipes.filters.accuracy_varies
      --custom-rollout-log-function-path slime_fipo.recipes.rollout_metrics.log_rollout_data
   )
   local -a eval_args=()
   [[ ${#eval_data[@]} -eq 0 ]] || eval_args=(
      --eval-interval "${EVAL_INTERVAL}"
      --eval-prompt-data "${eval_data[@]}"
      --n-samples-per-eval-prompt "${EVAL_SAMPLES}"
      --eval-max-response-len "${MAX_RESPONSE_LEN}"
      --eval-temperature 1.0
      --eval-top-p 0.7
      --custom-eval-rollout-log-function-path slime_fipo.recipes.evaluation.log_eval_rollout_data
   )
   local -a algorithm_args=(
      --advantage-estimator grpo
      --calculate-per-token-loss
      --eps-clip 0.2
      --eps-clip-high 0.28
      --entropy-coef 0.0
      --kl-coef 0.0
   )
   local -a optimizer_args=(
      --optimizer adam
      --lr 1e-6
      --lr-decay-style constant
      --lr-warmup-iters "$((WARMUP_ROLLOUTS * ROLLOUT_BATCH_SIZE * N_SAMPLES_PER_PROMPT / GLOBAL_BATCH_SIZE))"
      # a continued run may have another NUM_ROLLOUT than its checkpoint; the rate is constant either way
      --override-opt-param-scheduler
      --weight-decay 0.1
      # torch's and verl's second moment, as in the paper; slime's own scripts take 0.98
      --adam-beta1 0.9
      --adam-beta2 0.999
      --clip-grad 1.0
   )
   local -a perf_args=(
      --tensor-model-parallel-size "${TP:-1}"
      --pipeline-model-parallel-size "${PP:-1}"
      --context-parallel-size "${CP:-1}"
      --recompute-granularity full
      --recompute-method uniform
      --recompute-num-layers 1
      --use-dynamic-batch-size
      --max-tokens-per-gpu "${MAX_TOKENS_PER_GPU:?a launch script sets MAX_TOKENS_PER_GPU}"
   )
   [[ ${TP:-1} -eq 1 ]] || perf_args+=(--sequence-parallel)
   local -a sglang_args=(
      --rollout-num-gpus-per-engine "${ROLLOUT_GPUS_PER_ENGINE}"
      --sglang-mem-fraction-static "${SGLANG_MEM_FRACTION}"
   )
   # Megatron pads the vocabulary to a multiple of 128 × TP. Its softmax runs over the padding too, SGLang's does not.
   local -a vocab_args=()
   local divisor=128 vocab
   vocab="$(value_of --vocab-size "${MODEL_ARGS[@]}")"
   while ((vocab % (divisor * ${TP:-1}) && divisor > 1)); do divisor=$((divisor / 2)); done
   [[ ${divisor} -eq 128 ]] || vocab_args=(--make-vocab-size-divisible-by "${divisor}")
   local -a misc_args=(
      # Megatron's default dropout is 0.1
      --attention-dropout 0.0
      --hidden-dropout 0.0
      --accumulate-allreduce-grads-in-fp32
      --attention-softmax-in-fp32
      --attention-backend flash
   )
   local -a train=(
      python3 -m slime_fipo "${SLIME_DIR}/train.py"
      --actor-num-nodes "${NUM_NODES}"
      --actor-num-gpus-per-node "${GPUS_PER_NODE}"
      --num-gpus-per-node "${GPUS_PER_NODE}"
      --colocate
      "${MODEL_ARGS[@]}"
      "${vocab_args[@]}"
      "${ckpt_args[@]}"
      "${rollout_args[@]}"
      "${reward_args[@]}"
      "${eval_args[@]}"
      "${algorithm_args[@]}"
      "${loss_args[@]}"
      "${optimizer_args[@]}"
      "${perf_args[@]}"
      "${sglang_args[@]}"
      "${misc_args[@]}"
      "${wandb_args[@]}"
      "$@"
   )

   if [[ ${REHEARSE:-0} == 1 ]]; then
      rehearse "${train[@]}"
      return
   fi
   if [[ ${DRY_RUN:-0} != 1 && ${CHECK:-1} != 0 ]]; then
      require_checkouts
      PYTHONPATH="${FIPO_DIR}:${MEGATRON_DIR}${PYTHONPATH:+:${PYTHONPATH}}" \
         python3 -m slime_fipo.cli check -- "${train[@]}"
   fi
   # NVLink SHARP only where there is NVLink, as slime's own scripts have it.
   local nvls=0
   if nvidia-smi topo -m 2>/dev/null | grep -q 'NV[0-9]'; then nvls=1; fi
   submit "${GPUS_PER_NODE}" \
      "PYTHONPATH=${FIPO_DIR}:${SLIME_DIR}:${MEGATRON_DIR}" \
      CUDA_DEVICE_MAX_CONNECTIONS=1 \
      SLIME_FIPO_SAVE_ON_SIGTERM=1 \
      "NCCL_NVLS_ENABLE=${nvls}" \
      -- "${train[@]}"
}
