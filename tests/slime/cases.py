"""What is run through slime's real loss: each case is slime's flags, FIPO's flags, and the data they apply to."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, field

from slime_fipo.plugin.arguments import LOSS_PATH, MISMATCH_METRICS_PATH

HOOKS = "tests.slime.hooks"

# The part of slime's namespace that its loss reads, at slime's defaults.
SLIME_DEFAULTS = dict(
    advantage_estimator="grpo",
    allgather_cp=False,
    calculate_per_token_loss=False,
    compute_advantages_and_returns=True,
    custom_loss_function_path=LOSS_PATH,
    custom_pg_loss_reducer_function_path=None,
    custom_tis_function_path=None,
    entropy_coef=0.0,
    eps_clip=0.2,
    eps_clip_c=None,
    eps_clip_high=0.28,
    get_mismatch_metrics=False,
    kl_coef=0.0,
    kl_loss_coef=0.0,
    kl_loss_type="k1",
    log_probs_chunk_size=-1,
    loss_type="custom_loss",
    opsm_delta=1e-4,
    qkv_format="thd",
    recompute_loss_function=False,
    rollout_temperature=1.0,
    rollout_top_p=1.0,
    tis_clip=2.0,
    tis_clip_low=0.0,
    use_kl_loss=False,
    use_opsm=False,
    use_rollout_logprobs=False,
    use_tis=False,
    use_unbiased_kl=False,
)


@dataclass(frozen=True)
class Case:
    """``objective``: comparable with ``fipo_policy_loss`` alone, no other term or mask in the loss."""

    args: dict = field(default_factory=dict)
    data: str = "responses"
    objective: bool = False
    allgather: bool = False
    versions: tuple[str, ...] = ("main", "v0.3.1", "v0.3.0")

    def namespace(self, **overrides) -> Namespace:
        return Namespace(**{**SLIME_DEFAULTS, **self.args, **overrides})


TOP_P_VERSIONS = ("main", "v0.3.1")
EVERYTHING = dict(
    calculate_per_token_loss=True,
    custom_pg_loss_reducer_function_path=f"{HOOKS}.constant_length_reducer",
    entropy_coef=0.01,
    fipo_preset="7b",
    kl_loss_coef=0.05,
    kl_loss_type="low_var_kl",
    recompute_loss_function=True,
    rollout_temperature=0.7,
    use_kl_loss=True,
    use_opsm=True,
    use_unbiased_kl=True,
)

CASES = {
    "defaults": Case(objective=True),
    "per_token_loss": Case(dict(calculate_per_token_loss=True), objective=True),
    "preset_7b": Case(dict(fipo_preset="7b", fipo_log_detail=True), objective=True),
    "preset_32b": Case(dict(fipo_preset="32b"), objective=True),
    "short_decay": Case(dict(fipo_decay_rate=3.0), objective=True),
    "trained_tokens": Case(dict(fipo_decay_over="trained_tokens", fipo_decay_rate=6.0), objective=True),
    "chunked": Case(dict(fipo_impl="chunked", fipo_chunk_size=16), objective=True),
    "unclipped": Case(dict(fipo_unclipped=True), objective=True),
    "no_dual_clip": Case(dict(fipo_dual_clip_c="none"), objective=True),
    "no_sequence_filter": Case(dict(fipo_max_dual_clipped_tokens="none"), objective=True),
    "rollout_logprobs": Case(dict(use_rollout_logprobs=True), objective=True),
    "prompt_heavy": Case(dict(fipo_log_detail=True), data="prompt_heavy", objective=True),
    "prompt_heavy_trained_tokens": Case(dict(fipo_decay_over="trained_tokens"), data="prompt_heavy", objective=True),
    "no_response": Case(data="no_response", objective=True),
    "temperature": Case(dict(rollout_temperature=0.6), objective=True),
    "top_p_replay": Case(dict(rollout_top_p=0.9), objective=True, versions=TOP_P_VERSIONS),
    "shift_from_train": Case(
        dict(
            use_rollout_logprobs=True,
            fipo_shift_from="train",
            get_mismatch_metrics=True,
            custom_tis_function_path=MISMATCH_METRICS_PATH,
        )
    ),
    "recompute": Case(dict(recompute_loss_function=True)),
    "opsm": Case(dict(use_opsm=True)),
    "tis": Case(dict(use_tis=True)),
    "custom_tis": Case(dict(use_tis=True, custom_tis_function_path=f"{HOOKS}.rejecting_tis")),
    "kl_loss": Case(dict(use_kl_loss=True, kl_loss_coef=0.05, kl_loss_type="k3")),
    "unbiased_kl_loss": Case(
        dict(use_kl_loss=True, kl_loss_coef=0.05, kl_loss_type="low_var_kl", use_unbiased_kl=True)
    ),
    "entropy_bonus": Case(dict(entropy_coef=0.01)),
    "pg_loss_reducer": Case(dict(custom_pg_loss_reducer_function_path=f"{HOOKS}.constant_length_reducer")),
    "everything_tis": Case(dict(EVERYTHING, use_tis=True, custom_tis_function_path=f"{HOOKS}.rejecting_tis")),
    "everything_rollout_logprobs": Case(
        dict(
            EVERYTHING,
            use_rollout_logprobs=True,
            get_mismatch_metrics=True,
            custom_tis_function_path=f"{HOOKS}.rejecting_tis",
            fipo_shift_from="train",
        )
    ),
    "everything_top_p": Case(dict(EVERYTHING, rollout_top_p=0.9, use_tis=True), versions=TOP_P_VERSIONS),
    "allgather_cp": Case(dict(allgather_cp=True), allgather=True),
    "allgather_cp_trained_tokens": Case(
        dict(allgather_cp=True, fipo_decay_over="trained_tokens", calculate_per_token_loss=True), allgather=True
    ),
}

# Every weight is 1: both clip ratios 0 and no sequence filter. «Bitwise» is checked on each.
UNIT_WEIGHTS = dict(fipo_clip_ratio_low=0.0, fipo_clip_ratio_high=0.0, fipo_max_dual_clipped_tokens="none")
UNIT_CASES = {
    "defaults": Case(UNIT_WEIGHTS),
    "recompute": Case(dict(UNIT_WEIGHTS, recompute_loss_function=True)),
    "kl_entropy_opsm_tis": Case(
        dict(
            UNIT_WEIGHTS,
            calculate_per_token_loss=True,
            entropy_coef=0.01,
            kl_loss_coef=0.05,
            kl_loss_type="k3",
            use_kl_loss=True,
            use_opsm=True,
            use_tis=True,
        )
    ),
    "rollout_logprobs": Case(dict(UNIT_WEIGHTS, use_rollout_logprobs=True)),
}
