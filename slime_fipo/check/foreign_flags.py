"""Flags of other RL frameworks (verl, TRL, ms-swift, OpenRLHF) that slime's parser ignores, and slime's way to say it.

Other spellings of FIPO's flags are not listed here; nor is a name that slime, Megatron-LM or SGLang know.
SGLang's flags may be abbreviated in slime, so ``--sglang-mem-fraction`` works and is not listed either.
"""

from __future__ import annotations

_BATCH = "--global-batch-size (samples per optimizer step)"
_CLIP_HIGH = "--eps-clip-high"
_ENGINE_MEMORY = "--sglang-mem-fraction-static"
_EPOCHS = "--num-rollout or --num-epoch; slime trains on each response once"
_GROUP = "--n-samples-per-prompt"
_KL_LOSS = "--use-kl-loss with --kl-loss-coef"
_MICRO_BATCH = "--micro-batch-size, or --use-dynamic-batch-size with --max-tokens-per-gpu"
_MODEL = "--hf-checkpoint"
_PROMPTS = "--prompt-data"
_PROMPT_LENGTH = "--rollout-max-prompt-len"
_RECOMPUTE = "--recompute-granularity, --recompute-method and --recompute-num-layers"
_RESPONSE_LENGTH = "--rollout-max-response-len"
_REWARD = "--custom-rm-path (module.function) or --rm-type"
_STEPS = "--num-steps-per-rollout or --global-batch-size; slime takes each response once"
_TRACKING = "--use-wandb or --use-tensorboard"

REPLACEMENTS = {
    "actor-learning-rate": "--lr",
    "adv-estimator": "--advantage-estimator",
    "beta": _KL_LOSS,
    "ckpt-path": "--save and --load",
    "clip-eps": "--eps-clip",
    "clip-eps-high": _CLIP_HIGH,
    "clip-eps-low": "--eps-clip",
    "colocate-all-models": "--colocate",
    "custom-reward-function-name": _REWARD,
    "custom-reward-function-path": _REWARD,
    "dataset": _PROMPTS,
    "dataset-name": _PROMPTS,
    "dynamic-filtering": "--dynamic-sampling-filter-path",
    "dynamic-sample": "--dynamic-sampling-filter-path",
    "entropy-coeff": "--entropy-coef",
    "eps-clip-low": "--eps-clip, the lower bound where --eps-clip-high is given",
    "eps-clip-low-high": "--eps-clip and --eps-clip-high",
    "epsilon": "--eps-clip",
    "epsilon-high": _CLIP_HIGH,
    "epsilon-low": "--eps-clip",
    "eval-steps": "--eval-interval (rollouts)",
    "filter-groups": "--dynamic-sampling-filter-path",
    "generate-max-len": _RESPONSE_LENGTH,
    "gpu-memory-utilization": _ENGINE_MEMORY,
    "gradient-accumulation-steps": _BATCH,
    "gradient-checkpointing": _RECOMPUTE,
    "init-kl-coef": "--kl-coef",
    "kl-beta": _KL_LOSS,
    "learning-rate": "--lr",
    "logging-dir": "--tensorboard-dir",
    "loss-agg-mode": "--calculate-per-token-loss (a mean over tokens; without it over responses)",
    "lr-scheduler-type": "--lr-decay-style",
    "max-completion-length": _RESPONSE_LENGTH,
    "max-grad-norm": "--clip-grad",
    "max-new-tokens": _RESPONSE_LENGTH,
    "max-prompt-length": _PROMPT_LENGTH,
    "max-response-length": _RESPONSE_LENGTH,
    "micro-train-batch-size": _MICRO_BATCH,
    "mini-batch-size": _BATCH,
    "model-name-or-path": _MODEL,
    "model-path": _MODEL,
    "num-episodes": _EPOCHS,
    "num-generations": _GROUP,
    "num-iterations": _STEPS,
    "num-train-epochs": _EPOCHS,
    "output-dir": "--save",
    "over-sample-batch-size": "--over-sampling-batch-size",
    "per-device-train-batch-size": _MICRO_BATCH,
    "ppo-epochs": _STEPS,
    "ppo-micro-batch-size": _MICRO_BATCH,
    "ppo-micro-batch-size-per-gpu": _MICRO_BATCH,
    "ppo-mini-batch-size": f"{_BATCH[:-1]}, not prompts)",
    "pretrain": _MODEL,
    "prompt-max-len": _PROMPT_LENGTH,
    "remote-rm-url": "--rm-url with --rm-type remote_rm",
    "report-to": _TRACKING,
    "resume-from-checkpoint": "--load",
    "reward-fn": _REWARD,
    "reward-func": _REWARD,
    "reward-funcs": _REWARD,
    "reward-function-path": _REWARD,
    "save-freq": "--save-interval (rollouts)",
    "save-path": "--save",
    "save-steps": "--save-interval (rollouts)",
    "steps-per-generation": _STEPS,
    "temperature": "--rollout-temperature",
    "test-freq": "--eval-interval (rollouts)",
    "top-k": "--rollout-top-k",
    "top-p": "--rollout-top-p",
    "total-epochs": _EPOCHS,
    "train-batch-size": f"--rollout-batch-size (prompts per rollout) and {_BATCH}",
    "val-before-train": "--skip-eval-before-train to leave it out",
    "vllm-gpu-memory-utilization": _ENGINE_MEMORY,
    "warmup-ratio": "--lr-warmup-fraction",
    "warmup-steps": "--lr-warmup-iters (optimizer steps)",
}


def replacement(flag: str) -> str | None:
    """slime's way to say ``--flag`` of another framework, in any spelling of it; None if it is no such flag."""
    return REPLACEMENTS.get(flag.lstrip("-").replace("_", "-").lower())
