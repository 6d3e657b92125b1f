"""slime's real argument parser, alone and under ``python3 -m slime_fipo``."""

import json
import shlex
from pathlib import Path

import pytest

from slime_fipo.check.parser_process import PARSE_ONLY
from slime_fipo.check.slime_parser import run_parser
from slime_fipo.plugin.arguments import HOOK_PATH, LOSS_PATH, MISMATCH_METRICS_PATH, ROLLOUT_DATA_HOOK_PATH

MODEL = dict(
    architectures=["Qwen3ForCausalLM"],
    model_type="qwen3",
    head_dim=16,
    hidden_size=64,
    intermediate_size=128,
    max_position_embeddings=4096,
    num_attention_heads=4,
    num_hidden_layers=2,
    num_key_value_heads=2,
    rms_norm_eps=1e-6,
    rope_theta=1000000,
    tie_word_embeddings=False,
    vocab_size=512,
)
FLAGS = shlex.split("""
    --num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --group-query-attention
    --num-query-groups 2 --kv-channels 16 --swiglu --disable-bias-linear --normalization RMSNorm --norm-epsilon 1e-6
    --rotary-base 1000000 --vocab-size 512 --untie-embeddings-and-output-weights --seq-length 1024 --micro-batch-size 1
    --num-rollout 2 --rollout-batch-size 8 --n-samples-per-prompt 4 --prompt-data prompts.jsonl
    --actor-num-gpus-per-node 4 --tensor-model-parallel-size 2 --context-parallel-size 2 --eps-clip-high 0.28
""")
BATCH = ["--global-batch-size", "8"]
FIPO = ["--loss-type", "fipo_loss"]
TRAIN_FROM_ROLLOUT = [*FIPO, "--fipo-shift-from", "train", "--use-rollout-logprobs"]
ONE_STEP = ["--global-batch-size", "32"]

# name: (flags after the model's, in the message)
ERRORS = {
    "single_step": ([*ONE_STEP, *FIPO], "--global-batch-size 32 of 32 samples"),
    "single_step_of_two_thirds": (["--global-batch-size", "20", *FIPO], "--global-batch-size 20 of 32 samples"),
    "num_steps_per_rollout": (["--num-steps-per-rollout", "1", *FIPO], "--num-steps-per-rollout 8"),
    "single_step_old_actor": ([*ONE_STEP, *FIPO, "--keep-old-actor"], "--fipo-allow-single-step where"),
    "single_step_on_policy": ([*ONE_STEP, *FIPO, "--fipo-allow-single-step"], "--use-rollout-logprobs"),
    "single_step_from_train": (
        [*ONE_STEP, *TRAIN_FROM_ROLLOUT, "--fipo-allow-single-step"],
        "without --fipo-shift-from train",
    ),
    "gspo": ([*BATCH, *FIPO, "--advantage-estimator", "gspo"], "--advantage-estimator gspo"),
    "no_advantages": ([*BATCH, *FIPO, "--disable-compute-advantages-and-returns"], "--disable-compute-advantages"),
    "decay_rate": ([*BATCH, *FIPO, "--fipo-decay-rate", "0"], "--fipo-decay-rate is 0.0"),
    "clip_ratio_low": ([*BATCH, *FIPO, "--fipo-clip-ratio-low", "1"], "--fipo-clip-ratio-low is 1.0"),
    "clip_ratio_high": ([*BATCH, *FIPO, "--fipo-clip-ratio-high", "-0.1"], "--fipo-clip-ratio-high is -0.1"),
    "clip_ratio_zero": ([*BATCH, *FIPO, "--fipo-clip-ratio", "0"], "--fipo-clip-ratio 0 means"),
    "clip_ratio_twice": (
        [*BATCH, *FIPO, "--fipo-clip-ratio", "0.2", "--fipo-clip-ratio-low", "0.1"],
        "--fipo-clip-ratio-low",
    ),
    "unclipped_and_clipped": (
        [*BATCH, *FIPO, "--fipo-unclipped", "--fipo-clip-ratio-high", "0.3"],
        "--fipo-unclipped",
    ),
    "safety_thresh": ([*BATCH, *FIPO, "--fipo-safety-thresh", "0"], "--fipo-safety-thresh is 0.0"),
    "dual_clip_c": ([*BATCH, *FIPO, "--fipo-dual-clip-c", "1.2"], "--fipo-dual-clip-c is 1.2"),
    "max_dual_clipped": (
        [*BATCH, *FIPO, "--fipo-max-dual-clipped-tokens", "-1"],
        "--fipo-max-dual-clipped-tokens is -1",
    ),
    "chunk_size": ([*BATCH, *FIPO, "--fipo-chunk-size", "0"], "--fipo-chunk-size is 0"),
    "eps_clip_c": ([*BATCH, *FIPO, "--eps-clip-c", "3"], "--eps-clip-c 3.0 contradicts --fipo-dual-clip-c 10"),
    "eps_clip_c_without_dual_clip": (
        [*BATCH, *FIPO, "--eps-clip-c", "3", "--fipo-dual-clip-c", "none"],
        "--eps-clip-c 3.0 contradicts --fipo-dual-clip-c none",
    ),
    "misspelt": (
        [*BATCH, *FIPO, "--fipo-decayrate", "3"],
        "--fipo-decayrate is not a flag, and slime ignores it; write --fipo-decay-rate",
    ),
    "flags_without_the_loss": ([*BATCH, "--fipo-decay-rate", "3"], "--fipo-decay-rate needs --loss-type fipo_loss"),
    "negated_without_the_loss": ([*BATCH, "--no-fipo-unclipped"], "--no-fipo-unclipped needs --loss-type fipo_loss"),
    "custom_loss_function": (
        [*BATCH, *FIPO, "--custom-loss-function-path", "a.b"],
        "--custom-loss-function-path has no effect",
    ),
    "custom_tis": (
        [*BATCH, *TRAIN_FROM_ROLLOUT, "--custom-tis-function-path", "a.b"],
        "--custom-tis-function-path has no effect",
    ),
    "yaml_misspelt": (
        [*BATCH, *FIPO, "--custom-config-path", "misspelt.yaml"],
        "fipo_decayrate is not a setting; write fipo_decay_rate",
    ),
    "yaml_list": ([*BATCH, *FIPO, "--custom-config-path", "list.yaml"], "--fipo-decay-rate is [3]"),
    "record_samples": ([*BATCH, *FIPO, "--fipo-record-samples", "8"], "--fipo-record-samples has no effect without"),
    "record_interval": (
        [*BATCH, *FIPO, "--fipo-record", "r", "--fipo-record-interval", "0"],
        "--fipo-record-interval is 0",
    ),
    "record_wandb": ([*BATCH, *FIPO, "--fipo-record-wandb"], "--fipo-record-wandb has no effect without --fipo-record"),
    "record_wandb_alone": (
        [*BATCH, *FIPO, "--fipo-record", "r", "--fipo-record-wandb"],
        "--fipo-record-wandb has no effect without --use-wandb",
    ),
    "record_without_the_loss": ([*BATCH, "--fipo-record", "r"], "--fipo-record needs --loss-type fipo_loss"),
    "lacking_slime": ([*BATCH, *FIPO], "slime.backends.megatron_utils.loss.compute_policy_loss"),
}
# What the launcher alone says: it looks at the words of the command line and into the files before slime does.
LAUNCHER_ERRORS = {
    "underscores": ([*BATCH, *FIPO, "--fipo_decay_rate", "64"], "write --fipo-decay-rate"),
    "one_dash": ([*BATCH, *FIPO, "-fipo-decay-rate=64"], "write --fipo-decay-rate"),
    "ms_swift": ([*BATCH, *FIPO, "--fipo_safety_threshold", "4"], "ms-swift's name, and slime ignores it"),
    "overlong": ([*BATCH, "--overlong-bufer-len", "4"], "did you mean --overlong-buffer-len?"),
    "switch_with_false": ([*BATCH, *FIPO, "--fipo-clip-high-only", "false"], "write --no-fipo-clip-high-only"),
    "switch_is_false": ([*BATCH, *FIPO, "--fipo-clip-high-only=false"], "write --no-fipo-clip-high-only"),
    "loss_type_underscored": ([*BATCH, "--loss_type", "fipo_loss"], "use --loss-type fipo_loss"),
    "loss_type_fipo": ([*BATCH, "--loss-type", "fipo"], "--loss-type is fipo; use --loss-type fipo_loss"),
    "batch_of_zero": (["--global-batch-size", "0", *FIPO], "--global-batch-size is 0; it must be a whole number of"),
    "negative_batch": (["--global-batch-size", "-8", *FIPO], "--global-batch-size is -8; it must be"),
    "part_of_a_batch": (["--global-batch-size", "8.5", *FIPO], "--global-batch-size is the text '8.5'; it must be"),
    "no_steps": (["--num-steps-per-rollout", "0", *FIPO], "--num-steps-per-rollout is 0; it must be"),
    "yaml_text": ([*BATCH, *FIPO, "--custom-config-path", "text.yaml"], "write eps_clip_high: 0.28 in --custom-config"),
    "yaml_batch": (
        [*BATCH, *FIPO, "--custom-config-path", "batch.yaml"],
        "write global_batch_size: 8 in --custom-conf",
    ),
    "yaml_missing": ([*BATCH, *FIPO, "--custom-config-path", "missing.yaml"], "cannot be read"),
    "yaml_without_the_loss": (
        [*BATCH, "--custom-config-path", "fipo.yaml"],
        "fipo.yaml needs --loss-type fipo_loss; it is policy_loss",
    ),
    "role_missing": ([*BATCH, *FIPO, "--megatron-config-path", "missing.yaml"], "missing.yaml cannot be read"),
    "yaml_policy_loss": (
        [*BATCH, *FIPO, "--custom-config-path", "plain.yaml"],
        "plain.yaml wins over --loss-type fipo_loss and turns FIPO off",
    ),
    "role_policy_loss": ([*BATCH, *FIPO, "--megatron-config-path", "policy.yaml"], "loss_type of the actor in "),
    "role_fipo_loss": (
        [*BATCH, "--megatron-config-path", "fipo_loss.yaml"],
        "put --loss-type fipo_loss on the command",
    ),
    "role_gspo": ([*BATCH, *FIPO, "--megatron-config-path", "gspo.yaml"], "--advantage-estimator gspo"),
}
YAML = {
    "misspelt.yaml": "fipo_decayrate: 3",
    "list.yaml": "fipo_decay_rate: [3]",
    "text.yaml": "eps_clip_high: 28e-2",
    "batch.yaml": 'global_batch_size: "8"',
    "plain.yaml": "loss_type: policy_loss\n",
    "policy.yaml": "megatron: [{role: actor, overrides: {loss_type: policy_loss}}]",
    "fipo_loss.yaml": "megatron: [{role: actor, overrides: {loss_type: fipo_loss}}]",
    "gspo.yaml": "megatron: [{role: actor, overrides: {advantage_estimator: gspo}}]",
    "roles.yaml": "megatron: [{role: actor, overrides: {fipo_clip_ratio: 0.3, eps_clip_high: '3e-1', lr: 2e-6}}]",
    "words.yaml": 'fipo_unclipped: "false"\nfipo_log_detail: "yes"\n',
    "fipo.yaml": "fipo_decay_rate: 48.0\nfipo_preset: 7b\nfipo_safety_thresh: none\n",
    "route.yaml": f"fipo_decay_rate: 48.0\nloss_type: custom_loss\ncustom_loss_function_path: {LOSS_PATH}\n",
    "record.yaml": f"loss_type: custom_loss\ncustom_loss_function_path: {LOSS_PATH}\nfipo_record: /records\n"
    f"custom_megatron_before_train_step_hook_path: {HOOK_PATH}\n"
    f"rollout_data_postprocess_path: {ROLLOUT_DATA_HOOK_PATH}\n",
}


def cases(tmp_path: Path, version: str) -> dict:
    """All runs: what slime alone makes of some flags, and what it makes of them under the launcher."""

    def wrapped(*flags, script=None):
        return {"wrapper": True, "script": script, "arguments": [*common, *flags]}

    def alone(*flags):
        return {"wrapper": False, "arguments": [*common, *flags]}

    # v0.3.0 wants an SGLang older than the installed one; without rollouts no version reads SGLang's flags.
    common = [*FLAGS, "--debug-train-only", "--hf-checkpoint", str(tmp_path), "--ref-load", str(tmp_path)]
    lacking = tmp_path / "lacking.py"
    lacking.write_text("import slime.backends.megatron_utils.loss as loss\ndel loss.compute_policy_loss\n" + PARSE_ONLY)
    runs = {
        "slime": alone(*BATCH),
        "policy_loss": wrapped(*BATCH),
        "fipo": wrapped(*BATCH, *FIPO),
        "preset": wrapped(*BATCH, *FIPO, "--fipo-preset", "32b", "--fipo-decay-rate=64", "--fipo-log-detail"),
        "unclipped": wrapped(*BATCH, *FIPO, "--fipo-unclipped"),
        "num_steps": wrapped("--num-steps-per-rollout", "4", *FIPO),
        "stale": wrapped(*ONE_STEP, *FIPO, "--fipo-allow-single-step", "--use-rollout-logprobs"),
        "old_actor": wrapped(*ONE_STEP, *FIPO, "--fipo-allow-single-step", "--keep-old-actor"),
        "from_train": wrapped(*BATCH, *TRAIN_FROM_ROLLOUT),
        "own_mismatch": wrapped(
            *BATCH, *TRAIN_FROM_ROLLOUT, "--get-mismatch-metrics", "--custom-tis-function-path", "my.tis"
        ),
        "hook": wrapped(*BATCH, *FIPO, "--custom-megatron-before-train-step-hook-path", "my.hook"),
        "same_c": wrapped(*BATCH, *FIPO, "--eps-clip-c", "3", "--fipo-dual-clip-c", "3"),
        "yaml": wrapped(*BATCH, *FIPO, "--custom-config-path", str(tmp_path / "fipo.yaml")),
        "words": wrapped(*BATCH, *FIPO, "--custom-config-path", str(tmp_path / "words.yaml")),
        "roles": wrapped(
            *BATCH, *FIPO, "--fipo-decay-rate", "48", "--megatron-config-path", str(tmp_path / "roles.yaml")
        ),
        "yaml_route": wrapped(*BATCH, "--custom-config-path", str(tmp_path / "route.yaml")),
        "record": wrapped(*BATCH, *FIPO, "--fipo-record", "records", "--rollout-data-postprocess-path", "my.rollout"),
        "record_few": wrapped(
            *BATCH, *FIPO, "--fipo-record", "/r", "--fipo-record-samples", "8", "--fipo-record-interval", "3"
        ),
        "record_yaml_alone": alone(*BATCH, "--custom-config-path", str(tmp_path / "record.yaml")),
        "yaml_route_alone": alone(*BATCH, "--custom-config-path", str(tmp_path / "route.yaml")),
        "help": wrapped("--help"),
    }
    # What the launcher says before slime's parser does is the same in every version.
    for name, (flags, _) in {**ERRORS, **(LAUNCHER_ERRORS if version == "main" else {})}.items():
        flags = [str(tmp_path / flag) if flag.endswith(".yaml") else flag for flag in flags]
        runs[f"error_{name}"] = wrapped(*flags, script=str(lacking) if name == "lacking_slime" else None)
    if version != "v0.3.0":
        runs["error_cispo"] = wrapped(*BATCH, *FIPO, "--advantage-estimator", "cispo")
        runs["with_sglang"] = wrapped(*BATCH, *FIPO)
        runs["with_sglang"]["arguments"].remove("--debug-train-only")
    return runs


@pytest.fixture(scope="session")
def parsed(slime, version, megatron, tmp_path_factory):
    """Every case's exit status, output and namespace."""
    tmp_path = tmp_path_factory.mktemp(f"parser-{version}")
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    for name, text in YAML.items():
        (tmp_path / name).write_text(text)
    return run_parser(cases(tmp_path, version), [slime, megatron], time_limit=540)["cases"]


def namespace(run: dict) -> dict:
    assert run["status"] == 0, run["output"][-2000:]
    return run["namespace"]


def test_without_fipo_loss_the_namespace_is_slimes(parsed):
    assert namespace(parsed["policy_loss"]) == namespace(parsed["slime"])
    assert namespace(parsed["yaml_route"]) == namespace(parsed["yaml_route_alone"])


def test_with_fipo_loss_it_is_slimes_plus_ours(parsed):
    slime, fipo = namespace(parsed["slime"]), namespace(parsed["fipo"])
    ours = {name: fipo.pop(name) for name in list(fipo) if name.startswith("fipo_")}
    changed = {name: fipo[name] for name in fipo if fipo[name] != slime[name]}
    assert fipo.keys() == slime.keys()
    assert changed == {
        "loss_type": "'custom_loss'",
        "custom_loss_function_path": repr(LOSS_PATH),
        "custom_megatron_before_train_step_hook_path": repr(HOOK_PATH),
    }
    assert ours == {
        "fipo_allow_single_step": "False",
        "fipo_chained_hook_path": "None",
        "fipo_chunk_size": "128",
        "fipo_clip_high_only": "False",
        "fipo_clip_ratio": "None",
        "fipo_clip_ratio_high": "0.2",
        "fipo_clip_ratio_low": "0.2",
        "fipo_decay_over": "'positions'",
        "fipo_decay_rate": "32.0",
        "fipo_dual_clip_c": "10.0",
        "fipo_impl": "'auto'",
        "fipo_log_detail": "False",
        "fipo_max_dual_clipped_tokens": "1",
        "fipo_preset": "None",
        "fipo_record": "None",
        "fipo_record_interval": "None",
        "fipo_record_samples": "None",
        "fipo_record_wandb": "False",
        "fipo_safety_thresh": "10.0",
        "fipo_shift_from": "'ratio'",
        "fipo_unclipped": "False",
    }


def test_settings_reach_the_namespace(parsed):
    preset = namespace(parsed["preset"])
    expected = ("64.0", "True", "10.0", "True")
    assert (
        tuple(preset[f"fipo_{n}"] for n in ("decay_rate", "clip_high_only", "safety_thresh", "log_detail")) == expected
    )
    unclipped = namespace(parsed["unclipped"])
    assert (unclipped["fipo_unclipped"], unclipped["fipo_clip_ratio_low"]) == ("True", "None")
    assert namespace(parsed["num_steps"])["global_batch_size"] == "8"
    assert namespace(parsed["stale"])["loss_type"] == "'custom_loss'"
    assert namespace(parsed["old_actor"])["fipo_allow_single_step"] == "True"
    assert namespace(parsed["hook"])["fipo_chained_hook_path"] == "'my.hook'"
    assert namespace(parsed["same_c"])["eps_clip_c"] == "3.0"
    yaml = namespace(parsed["yaml"])
    assert (yaml["fipo_decay_rate"], yaml["fipo_safety_thresh"], yaml["loss_type"]) == (
        "48.0",
        "'none'",
        "'custom_loss'",
    )


def test_words_and_overrides_are_read_as_meant(parsed):
    words = namespace(parsed["words"])
    assert (words["fipo_unclipped"], words["fipo_log_detail"], words["fipo_clip_ratio_low"]) == ("False", "True", "0.2")
    roles = namespace(parsed["roles"])
    names = ("fipo_clip_ratio_low", "fipo_clip_ratio_high", "fipo_decay_rate", "eps_clip_high", "lr")
    # The actor's own values of slime's settings are put over these later, by slime.
    assert [roles[name] for name in names] == ["0.3", "0.3", "48.0", "0.28", "1e-06"]


def test_recording_has_slime_call_our_hook_and_ours_the_users(parsed):
    slime, record = namespace(parsed["slime"]), namespace(parsed["record"])
    assert slime["rollout_data_postprocess_path"] == "None"
    assert record["rollout_data_postprocess_path"] == repr(ROLLOUT_DATA_HOOK_PATH)
    assert record["fipo_chained_rollout_data_hook_path"] == "'my.rollout'"
    folder = record["fipo_record"].strip("'")
    assert Path(folder).is_absolute() and Path(folder).name == "records"
    assert (record["fipo_record_samples"], record["fipo_record_interval"]) == ("64", "10")
    few = namespace(parsed["record_few"])
    assert (few["fipo_record"], few["fipo_record_samples"], few["fipo_record_interval"]) == ("'/r'", "8", "3")
    by_yaml = namespace(parsed["record_yaml_alone"])
    same = ("custom_megatron_before_train_step_hook_path", "rollout_data_postprocess_path", "loss_type")
    assert {name: by_yaml[name] for name in same} == {name: record[name] for name in same}
    assert by_yaml["fipo_record"] == "'/records'"


def test_shift_from_train_has_slime_recompute_log_probs(parsed):
    arranged, own = namespace(parsed["from_train"]), namespace(parsed["own_mismatch"])
    assert arranged["get_mismatch_metrics"] == own["get_mismatch_metrics"] == "True"
    assert arranged["custom_tis_function_path"] == repr(MISMATCH_METRICS_PATH)
    assert own["custom_tis_function_path"] == "'my.tis'"


def test_with_sglangs_flags(parsed, version):
    if version == "v0.3.0":
        pytest.skip("slime v0.3.0 needs an SGLang older than the installed one for this")
    assert namespace(parsed["with_sglang"])["loss_type"] == "'custom_loss'"


@pytest.mark.parametrize("name", LAUNCHER_ERRORS)
@pytest.mark.parametrize("version", ["main"], indirect=True, scope="session")
def test_what_slime_would_ignore_or_stumble_over_ends_with_one_line(parsed, name, version):
    assert_ends_with_one_line(parsed, name)


@pytest.mark.parametrize("name", [*ERRORS, "cispo"])
def test_mistakes_end_the_script_with_one_line(parsed, name, version):
    if name == "cispo" and version == "v0.3.0":
        pytest.skip("slime v0.3.0 has no cispo")
    assert_ends_with_one_line(parsed, name)


def assert_ends_with_one_line(parsed, name):
    run = parsed[f"error_{name}"]
    assert run["status"] == 2
    assert run["namespace"] is None
    last = run["output"].strip().splitlines()[-1]
    script = "lacking.py" if name == "lacking_slime" else "parse_only.py"
    assert last.startswith(f"{script}: error: "), run["output"][-2000:]
    assert {**ERRORS, **LAUNCHER_ERRORS}.get(name, (None, "--advantage-estimator cispo"))[1] in last
    assert "Traceback" not in run["output"]


def test_help_shows_the_group(parsed):
    run = parsed["help"]
    assert run["status"] == 0
    for text in (
        "FIPO:",
        "--fipo-decay-rate",
        "--fipo-preset",
        "--fipo-shift-from",
        "fipo_loss",
        "--rollout-batch-size",
    ):
        assert text in run["output"], text
