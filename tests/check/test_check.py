"""``slime-fipo check``: a table of broken commands, each found by flag and fix; our own scripts pass."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from slime_fipo.check.command import parse_command
from slime_fipo.check.derived import OUR_EVAL_LOG, OUR_FILTER, OUR_REWARD, billions_of_parameters
from slime_fipo.check.preflight import check_command, effective_recipe, main
from slime_fipo.errors import UserError
from slime_fipo.plugin.arguments import LOSS_PATH

from ..scripts.bash import LAUNCH_SCRIPTS, LOSSES, dry_run, flags, train_arguments
from ..scripts.published import hugging_face_config
from .commands import (
    DATA,
    FIPO_FLAGS,
    HF,
    MATH_7B,
    PROMPT,
    QWEN3_4B,
    QWEN35_9B,
    QWEN_32B,
    TRACKER,
    Broken,
    command_of,
    expect,
    flag,
    messages,
    provide_files,
    without,
)

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("script", LAUNCH_SCRIPTS, ids=lambda s: s.stem)
def test_silent_on_our_own_scripts(script, loss, tmp_path):
    for logprobs in ("rollout", "train"):
        words = command_of(script, tmp_path / logprobs, LOSS=loss, LOGPROBS=logprobs)
        provide_files(words)
        assert check_command(parse_command(words))[0] == []
        assert check_command(parse_command(train_arguments(words)))[0] == [], "the arguments alone will do"


BROKEN = {
    "one step per rollout": Broken(
        "--global-batch-size 512 of 512 samples", "--global-batch-size 64", flag("--global-batch-size", "512")
    ),
    "one step by count": Broken(
        "--global-batch-size 512",
        "--num-steps-per-rollout 8",
        flag("--num-steps-per-rollout", "1"),
        ("--global-batch-size",),
    ),
    "batch does not divide": Broken(
        "--global-batch-size 96 does not divide",
        "32 of them are generated and never trained on",
        flag("--global-batch-size", "96"),
    ),
    "steps and batch disagree": Broken(
        "--global-batch-size 64", "drop one of the two", flag("--num-steps-per-rollout", "4")
    ),
    "batch does not divide over ranks": Broken(
        "--global-batch-size 2 does not divide over 4", "use 4", flag("--global-batch-size", "2")
    ),
    "group of one": Broken(
        "--n-samples-per-prompt 1", "use 16", flag("--n-samples-per-prompt", "1", "--global-batch-size", "4")
    ),
    "over-sampling below the batch": Broken(
        "--over-sampling-batch-size 16", "at least", flag("--over-sampling-batch-size", "16")
    ),
    "overlong buffer beyond the maximum": Broken(
        "--overlong-buffer-len 12000", "use 2048", flag("--overlong-buffer-len", "12000")
    ),
    "negative penalty factor": Broken(
        "--overlong-penalty-factor -1", "use 1.0", flag("--overlong-penalty-factor", "-1")
    ),
    "overlong buffer without the reward": Broken(
        "--overlong-buffer-len has no effect", OUR_REWARD, flag("--custom-rm-path", "my.reward")
    ),
    "reward key missing": Broken("--reward-key", "add --reward-key score", drop=("--reward-key",)),
    "reward key unknown": Broken("--reward-key reward", "use --reward-key score", flag("--reward-key", "reward")),
    "evaluation on the shaped score": Broken(
        "shaped score", "add --eval-reward-key acc", drop=("--eval-reward-key",), error=False
    ),
    "group filter on the shaped score": Broken(
        "--dynamic-sampling-filter-path",
        OUR_FILTER,
        flag(
            "--dynamic-sampling-filter-path",
            "slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std",
        ),
        error=False,
    ),
    "group filter without accuracy": Broken(
        f"--dynamic-sampling-filter-path {OUR_FILTER} reads 'acc'",
        OUR_REWARD,
        flag("--rm-type", "math"),
        ("--custom-rm-path", "--overlong-buffer-len", "--reward-key", "--eval-reward-key"),
    ),
    "TIS with rollout log-probs": Broken("--use-tis", "drop one of them", flag("--use-tis")),
    "mismatch metrics without a function": Broken(
        "--get-mismatch-metrics", "--custom-tis-function-path slime_fipo", flag("--get-mismatch-metrics")
    ),
    "TIS function without TIS": Broken(
        "--custom-tis-function-path", "drop it", flag("--custom-tis-function-path", "my.tis"), error=False
    ),
    "asynchronous without rollout log-probs": Broken(
        "asynchronous rollouts",
        "--use-rollout-logprobs",
        flag("--rollout-num-gpus", "8"),
        ("--use-rollout-logprobs", "--colocate"),
        tool=("train.py", "train_async.py"),
        error=False,
    ),
    "shift from the trainer twice": Broken(
        "--fipo-shift-from train changes nothing",
        "add --use-rollout-logprobs",
        flag("--fipo-shift-from", "train"),
        ("--use-rollout-logprobs",),
        error=False,
    ),
    "32B threshold on a 4B model": Broken(
        "--fipo-safety-thresh 10", "--fipo-safety-thresh 3", flag("--fipo-safety-thresh", "10"), error=False
    ),
    "32B clip range on a 7B model": Broken(
        "--fipo-clip-high-only", "--fipo-preset 7b", flag("--fipo-clip-high-only"), script=MATH_7B, error=False
    ),
    "7B threshold on a 32B model": Broken(
        "--fipo-safety-thresh 3",
        "--fipo-safety-thresh 10",
        flag("--fipo-safety-thresh", "3"),
        script=QWEN_32B,
        error=False,
    ),
    "7B clip range on a 32B model": Broken(
        "weights in [0.8, 1.2]", "--fipo-preset 32b", flag("--no-fipo-clip-high-only"), script=QWEN_32B, error=False
    ),
    "dual clips contradict": Broken(
        "--eps-clip-c 3.0 contradicts --fipo-dual-clip-c 10", "drop --eps-clip-c", flag("--eps-clip-c", "3")
    ),
    "symmetric PPO clip": Broken("--eps-clip-high", "add --eps-clip-high 0.28", drop=("--eps-clip-high",), error=False),
    "mean over responses": Broken(
        "mean over responses", "add --calculate-per-token-loss", drop=("--calculate-per-token-loss",), error=False
    ),
    "no per-token ratio": Broken("--advantage-estimator gspo", "use grpo", flag("--advantage-estimator", "gspo")),
    "half-life out of range": Broken("--fipo-decay-rate is 0.0", "above 0", flag("--fipo-decay-rate", "0")),
    "misspelt FIPO flag": Broken("--fipo-decayrate", "write --fipo-decay-rate", flag("--fipo-decayrate", "64")),
    "misspelt slime flag": Broken(
        "--calculate-per-tokens-loss", "did you mean --calculate-per-token-loss?", flag("--calculate-per-tokens-loss")
    ),
    "FIPO flags with the baseline": Broken(
        "--fipo-preset", "use fipo_loss or drop it", flag("--fipo-preset", "7b"), variables={"LOSS": "policy_loss"}
    ),
    "slime's own launcher": Broken(
        "--overlong-buffer-len is ignored",
        "run python3 -m slime_fipo",
        tool=("slime_fipo", "pdb"),
        variables={"LOSS": "policy_loss"},
    ),
    "longer than the model's positions": Broken(
        "make up to 12288 tokens",
        "slime_fipo.recipes.extend_context",
        file=("models/Qwen2.5-Math-7B-32k/config.json", '{"max_position_embeddings": 4096}'),
        script=MATH_7B,
    ),
    "CP does not divide the GPUs": Broken(
        "--context-parallel-size 3", "does not divide the 8 GPUs", flag("--context-parallel-size", "3")
    ),
    "TP does not divide the key-value heads": Broken(
        "--tensor-model-parallel-size 8 does not divide --num-query-groups 4",
        "use a divisor",
        flag("--tensor-model-parallel-size", "8", "--context-parallel-size", "1", "--max-tokens-per-gpu", "12288"),
        script=QWEN35_9B,
    ),
    "sequence beyond the token budget": Broken(
        "--max-tokens-per-gpu 6000", "use 12288", flag("--max-tokens-per-gpu", "6000"), error=False
    ),
    "all-gather CP": Broken("--allgather-cp", "drop it", flag("--allgather-cp"), script=QWEN35_9B),
    "engines do not divide": Broken(
        "--rollout-num-gpus-per-engine 3", "use a divisor", flag("--rollout-num-gpus-per-engine", "3")
    ),
    "fused RoPE on Qwen3.5": Broken(
        "fused RoPE", "add --no-rope-fusion", drop=("--no-rope-fusion",), script=QWEN35_9B, error=False
    ),
    "data missing": Broken("--prompt-data", "check the path", file=(DATA, None)),
    "data with other keys": Broken(
        "--input-key prompt is not in every row",
        "question",
        file=(DATA, '{"question": "1 + 1 = ? Answer: N", "label": "2"}\n'),
    ),
    "data without labels": Broken(
        "--label-key label is not in every row",
        "answer",
        file=(DATA, '{"prompt": "1 + 1 = ? Answer: N", "answer": "2"}\n'),
    ),
    "labels that DAPO cannot compare": Broken(
        "'\\\\frac{1}{2}'",
        "use other data",
        file=(DATA, '{"prompt": "1 / 2 = ? Answer: N", "label": "\\\\frac{1}{2}"}\n'),
    ),
    "data in another format": Broken(
        "neither .jsonl nor .parquet",
        "convert it",
        flag("--prompt-data", "FILE:data.csv"),
        write={"data.csv": "prompt,label\n"},
    ),
    "evaluation data unpaired": Broken(
        "--eval-prompt-data", "pairs of a name and a path", flag("--eval-prompt-data", "aime24", "a.jsonl", "aime25")
    ),
    "evaluation without data": Broken("--eval-interval", "add it", drop=("--eval-prompt-data",)),
    "reference checkpoint missing": Broken("--ref-load", "convert_hf_to_torch_dist.py", file=(TRACKER, None)),
    "Hugging Face checkpoint missing": Broken(
        "--hf-checkpoint", "download the model", file=(f"{HF}/config.json", None)
    ),
    "another model's checkpoint": Broken(
        "--num-layers 36 is not the 40",
        "from scripts/models",
        file=(f"{HF}/config.json", '{"num_hidden_layers": 40, "tie_word_embeddings": true}'),
    ),
    "tied embeddings": Broken(
        "tied embeddings",
        "drop --untie-embeddings-and-output-weights",
        flag("--untie-embeddings-and-output-weights"),
    ),
    "resumes from elsewhere": Broken("--load", "give both the same folder", flag("--load", "/elsewhere"), error=False),
    "nothing saved": Broken("--save-interval needs --save", "add it", drop=("--save",)),
    "warm-up as long as the run": Broken(
        "--lr-warmup-iters 24 is not below the run's 24",
        "use 12",
        flag("--lr-warmup-iters", "24", "--num-rollout", "3"),
    ),
    "warm-up as long as the decay": Broken(
        "--lr-warmup-iters 80 is not below", "use 40", flag("--lr-decay-iters", "80", "--lr-warmup-iters", "80")
    ),
    "continued with another number of rollouts": Broken(
        "--num-rollout", "--override-opt-param-scheduler", drop=("--override-opt-param-scheduler",), error=False
    ),
    "one step in the YAML": Broken(
        "--global-batch-size 512 of 512 samples",
        "--global-batch-size 64",
        flag("--custom-config-path", "FILE:c.yaml"),
        write={"c.yaml": "global_batch_size: 512\n"},
    ),
    "misspelt FIPO setting in the YAML": Broken(
        "fipo_decayrate is not a setting",
        "write fipo_decay_rate in --custom-config-path",
        flag("--custom-config-path", "FILE:c.yaml"),
        write={"c.yaml": "fipo_decayrate: 64\n"},
    ),
    "FIPO setting of another kind in the YAML": Broken(
        "--fipo-safety-thresh is the text '3.0'",
        "write fipo_safety_thresh: 3.0 in --custom-config-path",
        flag("--custom-config-path", "FILE:c.yaml"),
        write={"c.yaml": "fipo_safety_thresh: '3.0'\n"},
    ),
    "misspelt flag in the YAML": Broken(
        "global_batch_sizes in --custom-config-path",
        "did you mean global_batch_size?",
        flag("--custom-config-path", "FILE:c.yaml"),
        write={"c.yaml": "global_batch_sizes: 64\n"},
    ),
    "a number that YAML takes for a text": Broken(
        "lr in --custom-config-path",
        "write 1.0e-6",
        flag("--custom-config-path", "FILE:c.yaml"),
        write={"c.yaml": "lr: 1e-6\n"},
    ),
    "a loss in the YAML that turns FIPO off": Broken(
        "loss_type: policy_loss in --custom-config-path",
        "wins over --loss-type fipo_loss and turns FIPO off; drop one of the two",
        flag("--custom-config-path", "FILE:c.yaml"),
        (
            "--fipo-decay-rate",
            "--fipo-clip-ratio-low",
            "--fipo-clip-ratio-high",
            "--fipo-safety-thresh",
            "--fipo-dual-clip-c",
        ),
        write={"c.yaml": "loss_type: policy_loss\n"},
    ),
    "YAML missing": Broken("--custom-config-path", "check the path", flag("--custom-config-path", "FILE:no.yaml")),
    "YAML without a mapping": Broken(
        "--custom-config-path",
        "one 'name: value' per line",
        flag("--custom-config-path", "FILE:c.yaml"),
        write={"c.yaml": "- global_batch_size\n"},
    ),
    "broken YAML": Broken(
        "is not valid YAML",
        "fix the syntax in line 3",
        flag("--custom-config-path", "FILE:c.yaml"),
        write={"c.yaml": "lr: 1.0\nsave: [\n"},
    ),
    "one step by slime's own route": Broken(
        "--global-batch-size 512 of 512 samples",
        "--global-batch-size 64",
        flag("--loss-type", "custom_loss", "--custom-loss-function-path", LOSS_PATH, "--global-batch-size", "512"),
        FIPO_FLAGS,
    ),
    "32B model's settings by slime's own route": Broken(
        "--fipo-safety-thresh 10",
        "--fipo-safety-thresh 3",
        flag("--loss-type", "custom_loss", "--custom-loss-function-path", LOSS_PATH),
        FIPO_FLAGS,
        error=False,
    ),
    "FIPO flags with slime's own route": Broken(
        "--fipo-decay-rate has no effect with --loss-type custom_loss",
        "use fipo_loss",
        flag("--loss-type", "custom_loss", "--custom-loss-function-path", LOSS_PATH),
    ),
    "evaluation file missing": Broken(
        "--eval-config", "check the path", flag("--eval-config", "FILE:no.yaml"), ("--eval-prompt-data",)
    ),
    "evaluation file without benchmarks": Broken(
        "--eval-config",
        "list them under eval: datasets:",
        flag("--eval-config", "FILE:e.yaml"),
        ("--eval-prompt-data",),
        write={"e.yaml": "eval:\n  datasets: []\n"},
    ),
    "evaluation file without a path": Broken(
        "benchmark 1 of --eval-config",
        "has no name and path",
        flag("--eval-config", "FILE:e.yaml"),
        ("--eval-prompt-data",),
        write={"e.yaml": "eval:\n  datasets:\n    - name: aime\n"},
    ),
    "benchmark's data missing": Broken(
        "aime in --eval-config",
        "check the path",
        flag("--eval-config", "FILE:e.yaml"),
        ("--eval-prompt-data",),
        write={"e.yaml": "eval:\n  datasets:\n    aime: {path: /nope/aime.jsonl}\n"},
    ),
    "benchmark longer than the positions": Broken(
        "max_response_len of aime in --eval-config",
        "extend_context",
        flag("--eval-config", "FILE:e.yaml"),
        ("--eval-prompt-data",),
        write={
            "aime.jsonl": json.dumps(PROMPT),
            "e.yaml": "defaults: {max_response_len: 65536}\ndatasets: [{name: aime, path: ROOT/aime.jsonl}]\n",
        },
    ),
    "benchmark without accuracy": Broken(
        f"--custom-eval-rollout-log-function-path {OUR_EVAL_LOG} leaves gpqa out",
        OUR_REWARD,
        flag("--eval-config", "FILE:e.yaml"),
        ("--eval-prompt-data",),
        write={
            "gpqa.jsonl": json.dumps(PROMPT),
            "e.yaml": "datasets: [{name: gpqa, path: ROOT/gpqa.jsonl, custom_rm_path: my.gpqa}]\n",
        },
        error=False,
    ),
    "benchmark's reward never called": Broken(
        "rm_type gpqa of gpqa",
        "give gpqa a custom_rm_path",
        flag("--eval-config", "FILE:e.yaml"),
        ("--eval-prompt-data",),
        write={
            "gpqa.jsonl": json.dumps(PROMPT),
            "e.yaml": "datasets: [{name: gpqa, path: ROOT/gpqa.jsonl, rm_type: gpqa}]\n",
        },
        error=False,
    ),
    "evaluation hook without accuracy": Broken(
        f"--custom-eval-rollout-log-function-path {OUR_EVAL_LOG} reads 'acc', which the reward of aime24",
        OUR_REWARD,
        flag("--rm-type", "math"),
        (
            "--custom-rm-path",
            "--overlong-buffer-len",
            "--reward-key",
            "--eval-reward-key",
            "--dynamic-sampling-filter-path",
        ),
    ),
    "more steps than samples": Broken(
        "--num-steps-per-rollout 1024 is more than a rollout's 512",
        "use 8",
        flag("--num-steps-per-rollout", "1024"),
        ("--global-batch-size",),
    ),
    "steps that do not divide": Broken(
        "--global-batch-size 73 (--num-steps-per-rollout 7) does not divide a rollout's 512",
        "use --num-steps-per-rollout 8",
        flag("--num-steps-per-rollout", "7"),
        ("--global-batch-size",),
    ),
    "sizes in config.json that are no numbers": Broken(
        "--num-layers 36 is not the '36'",
        "from scripts/models",
        file=(f"{HF}/config.json", '{"num_hidden_layers": "36", "hidden_size": null}'),
    ),
    "another head dimension": Broken(
        "--kv-channels 64 is not the 128", "from scripts/models", flag("--kv-channels", "64")
    ),
    "another vocabulary": Broken(
        "--vocab-size 152064 is not the 151936", "from scripts/models", flag("--vocab-size", "152064")
    ),
    "no QK layer norm": Broken("which has --qk-layernorm", "add it", drop=("--qk-layernorm",)),
    "QKV bias on Qwen3": Broken("does not have --add-qkv-bias", "drop it", flag("--add-qkv-bias")),
    "no QKV bias on Qwen2.5": Broken("which has --add-qkv-bias", "add it", drop=("--add-qkv-bias",), script=MATH_7B),
    "no position left for a prompt": Broken(
        "--rollout-max-prompt-len is missing",
        "add it",
        flag("--rollout-max-response-len", "32768", "--max-tokens-per-gpu", "32768"),
        ("--rollout-max-prompt-len",),
    ),
    "asynchronous on shared GPUs": Broken("--colocate", "use train.py", tool=("train.py", "train_async.py")),
    "no GPUs for rollouts": Broken("--colocate", "or --rollout-num-gpus", drop=("--colocate",)),
    "REINFORCE++ without normalization": Broken(
        "--advantage-estimator reinforce_plus_plus_baseline",
        "needs --normalize-advantages; add it",
        flag("--advantage-estimator", "reinforce_plus_plus_baseline"),
    ),
    "two KL terms": Broken(
        "--kl-coef 0.1 and --kl-loss-coef 0.001",
        "drop one of them",
        flag("--kl-coef", "0.1", "--use-kl-loss", "--kl-loss-coef", "0.001"),
    ),
    "underscores in a flag": Broken("--weight_decay", "did you mean --weight-decay?", flag("--weight_decay", "0.2")),
    "an abbreviated flag": Broken(
        "--global-batch ", "did you mean --global-batch-size?", flag("--global-batch", "512")
    ),
    "a flag in the plural": Broken("--clip-grads", "did you mean --clip-grad?", flag("--clip-grads", "0.5")),
    "misspelt hook module": Broken(
        "--dynamic-sampling-filter-path slime_fipo.recipes.filter.accuracy_varies does not exist",
        "check the spelling",
        flag("--dynamic-sampling-filter-path", "slime_fipo.recipes.filter.accuracy_varies"),
    ),
    "misspelt hook": Broken(
        "--custom-eval-rollout-log-function-path slime_fipo.recipes.evaluation.log_eval does not exist",
        "check the spelling",
        flag("--custom-eval-rollout-log-function-path", "slime_fipo.recipes.evaluation.log_eval"),
    ),
    "Hugging Face folder as reference": Broken(
        "is a Hugging Face folder", "convert_hf_to_torch_dist.py", flag("--ref-load", f"FILE:{HF}"), error=False
    ),
    "labels that are no integers": Broken(
        "'3.5'", "use other data", file=(DATA, '{"prompt": "1 + 1 = ? Answer: N", "label": "3.5"}\n')
    ),
    "no number of rollouts": Broken("--num-rollout is missing", "--num-epoch", drop=("--num-rollout",)),
}
# Faults that break two rules at once.
TWO_FINDINGS = {
    "nothing saved",
    "one step by count",
    "group filter without accuracy",
    "steps that do not divide",
}


def test_the_table_is_long_enough():
    assert len(BROKEN) >= 25


@pytest.mark.parametrize("name", BROKEN)
def test_finds_the_planted_fault(name, tmp_path, capsys):
    expect(BROKEN[name], tmp_path, capsys, at_most=2 if name in TWO_FINDINGS else 1)


SLIMES_ROUTE = ("--loss-type", "custom_loss", "--custom-loss-function-path", LOSS_PATH)
SILENT = {
    "slime's own route to FIPO": (("fipo_safety_thresh: 3.0\n"), ("--loss-type", *FIPO_FLAGS), SLIMES_ROUTE),
    "overlong penalty in the YAML": (
        "overlong_buffer_len: 2048\noverlong_penalty_factor: 1.0\n",
        ("--overlong-buffer-len", "--overlong-penalty-factor"),
        (),
    ),
    "a setting of the user's own hook in the YAML": ("my_setting: 1\n", (), ()),
    "an empty YAML": ("", (), ()),
    "evaluation alone": ("", (), ("--num-rollout", "0")),
    "epochs": ("", ("--num-rollout",), ("--num-epoch", "3")),
    "external engines": ("", ("--colocate",), ("--rollout-external-engine-addrs", "10.0.0.1:3000")),
    "recorded rollouts": ("", ("--prompt-data", "--colocate"), ("--load-debug-rollout-data", "x.pt")),
    "token records": (
        "fipo_record_interval: 5\n",
        (),
        flag("--fipo-record", "/r", "--fipo-record-wandb", "--use-wandb", "--rollout-data-postprocess-path", "my.hook"),
    ),
    "REINFORCE++": ("", (), ("--advantage-estimator", "reinforce_plus_plus", "--normalize-advantages")),
    "a remote reward, which may return accuracy": (
        "",
        (
            "--custom-rm-path",
            "--overlong-buffer-len",
            "--overlong-penalty-factor",
            "--reward-key",
            "--eval-reward-key",
        ),
        ("--rm-type", "remote_rm"),
    ),
    "KL loss": ("", (), ("--use-kl-loss", "--kl-loss-coef", "0.001")),
    "Megatron's schedule from the checkpoint": (
        "",
        ("--override-opt-param-scheduler",),
        ("--use-checkpoint-opt-param-scheduler",),
    ),
}


@pytest.mark.parametrize("name", SILENT)
def test_silent_on_what_works(name, sane, tmp_path):
    yaml, drop, add = SILENT[name]
    (tmp_path / "c.yaml").write_text(yaml)
    assert messages([*without(sane, drop), *add, "--custom-config-path", str(tmp_path / "c.yaml")]) == []


def test_a_trailing_slash_is_the_same_folder(sane):
    save = sane[sane.index("--save") + 1]
    assert messages([*sane, "--load", f"{save}/"]) == []
    assert messages([*sane, "--save", f"{save}/../{Path(save).name}"]) == []


def test_an_evaluation_file_that_works(sane, tmp_path):
    aime = flags(train_arguments(sane))["--eval-prompt-data"][1]
    (tmp_path / "own-keys.jsonl").write_text('{"question": "1 + 1 = ? Answer: N", "answer": "2"}\n')
    (tmp_path / "e.yaml").write_text(
        "eval:\n  defaults: {n_samples_per_eval_prompt: 8, max_response_len: 10240, top_p: 0.7}\n  datasets:\n"
        f"    - {{name: aime, path: '{aime}'}}\n"
        f"    - {{name: own, path: '{tmp_path}/own-keys.jsonl', input_key: question, label_key: answer}}\n"
        "    - {name: later, path: '${oc.env:DATA}/later.jsonl'}\n"
    )
    assert messages([*without(sane, ("--eval-prompt-data",)), "--eval-config", str(tmp_path / "e.yaml")]) == []


def test_a_slime_with_fipo_built_in(sane, tmp_path):
    """Its own train.py knows the loss and ours refuses to run there; elsewhere it is the other way round."""
    arguments = without(train_arguments(sane), ("--overlong-buffer-len", "--overlong-penalty-factor"))
    (tmp_path / "c.yaml").write_text("overlong_buffer_len: 2048\n")
    arguments += ["--custom-config-path", str(tmp_path / "c.yaml")]
    (script := tmp_path / "slime" / "train.py").parent.mkdir()
    plain, launched = ["python3", str(script)], ["python3", "-m", "slime_fipo", str(script)]

    unfound = messages([*plain, *arguments])  # nobody knows what is there
    assert len(unfound) == 1 and "slime-fipo patch apply" in unfound[0] and "run python3 -m slime_fipo" in unfound[0]
    assert messages([*launched, *arguments]) == []

    script.touch()
    unpatched = messages([*plain, *arguments])
    assert unpatched == [
        f"error: --loss-type fipo_loss is unknown to {script} without the launcher;"
        f" run python3 -m slime_fipo {script} …"
    ]
    assert messages([*launched, *arguments]) == []

    (fipo := script.parent / "slime" / "utils" / "fipo.py").parent.mkdir(parents=True)
    fipo.touch()
    assert messages([*plain, *arguments]) == []
    refused = messages([*launched, *arguments])
    assert len(refused) == 1 and "slime-fipo patch revert" in refused[0] and f"run python3 {script}" in refused[0]
    assert ["--fipo-impl" in m and "drop it" in m for m in messages([*plain, *arguments, "--fipo-impl", "scan"])] == [
        True
    ]
    overlong = messages([*plain, *arguments, "--overlong-buffer-len", "2048"])
    assert len(overlong) == 1 and "set overlong_buffer_len in the YAML" in overlong[0]
    assert "run python3 -m slime_fipo" not in overlong[0]


@pytest.mark.parametrize("batch", [3, 48, 96, 100, 130, 200, 300, 500, 511])
@pytest.mark.parametrize("prompts", [32, 30, 100])
def test_the_suggested_batch_size_is_right(batch, prompts, sane):
    words = [*sane, "--rollout-batch-size", str(prompts), "--over-sampling-batch-size", "200"]
    named = [
        m
        for m in messages([*words, "--global-batch-size", str(batch)])
        if "does not divide" in m or "is more than" in m
    ]
    assert named or (prompts * 16) % batch == 0
    for message in named:
        suggested = int(re.search(r"; use (\d+)$", message)[1])
        assert (prompts * 16) % suggested == 0 and suggested % 4 == 0  # 8 GPUs, TP 2
        assert not [m for m in messages([*words, "--global-batch-size", str(suggested)]) if "-batch-size" in m]
        nearer = range(max(batch - abs(batch - suggested) + 1, 4), batch + abs(batch - suggested))
        assert not [b for b in nearer if (prompts * 16) % b == 0 and b % 4 == 0 and b < prompts * 16]


SIZES = [
    "--actor-num-gpus-per-node",
    "--actor-num-nodes",
    "--context-parallel-size",
    "--global-batch-size",
    "--hidden-size",
    "--kv-channels",
    "--lr-decay-iters",
    "--lr-warmup-iters",
    "--max-tokens-per-gpu",
    "--micro-batch-size",
    "--moe-layer-freq",
    "--n-samples-per-prompt",
    "--num-attention-heads",
    "--num-experts",
    "--num-layers",
    "--num-query-groups",
    "--num-rollout",
    "--num-steps-per-rollout",
    "--over-sampling-batch-size",
    "--overlong-buffer-len",
    "--overlong-penalty-factor",
    "--pipeline-model-parallel-size",
    "--rollout-batch-size",
    "--rollout-max-context-len",
    "--rollout-max-prompt-len",
    "--rollout-max-response-len",
    "--rollout-num-gpus",
    "--rollout-num-gpus-per-engine",
    "--rollout-temperature",
    "--tensor-model-parallel-size",
    "--vocab-size",
]
JUNK = ["0", "-1", "1", "2", "3", "7", "1024", "100000000000000000000", "nan", "1.5", "x", ""]


@given(st.dictionaries(st.sampled_from(SIZES), st.sampled_from(JUNK), min_size=1, max_size=4), st.booleans())
@settings(max_examples=150, deadline=None)
def test_no_junk_gives_a_traceback(junk, dropped):
    """On the command line, for sizes alone and as the first of two."""
    words = dry_run(QWEN3_4B)
    words = [*(without(words, ("--global-batch-size",)) if dropped else words), *(f"{k}={v}" for k, v in junk.items())]
    try:
        command = parse_command(words)
    except UserError as error:
        assert "\n" not in str(error) and any(flag in str(error) for flag in junk)
        return
    findings, config = check_command(command)
    effective_recipe(command, config)
    assert all("\n" not in finding.message for finding in findings)


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.just(1024) | st.floats() | st.sampled_from(["", "7", "x"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["a", "name", "path"]), inner),
    max_leaves=4,
)
CONFIG_KEYS = [key for key in hugging_face_config("qwen3-4B", 32768)] + ["text_config", "rope_parameters"]
YAML_KEYS = [*(size[2:].replace("-", "_") for size in SIZES), "fipo_decay_rate", "loss_type", "lr", "save", "colocate"]
EVAL_KEYS = ["eval", "datasets", "defaults", "name", "path", "max_response_len", "custom_rm_path"]


@given(
    custom=st.dictionaries(st.sampled_from(YAML_KEYS), anything, max_size=3) | anything,
    evaluation=st.dictionaries(
        st.sampled_from(EVAL_KEYS), anything | st.dictionaries(st.sampled_from(EVAL_KEYS), anything)
    ),
    config=st.dictionaries(st.sampled_from(CONFIG_KEYS), anything) | anything,
    label=anything,
)
@example(custom=None, evaluation={"datasets": {"aime": {"path": None}}}, config={"hidden_size": "2560"}, label=None)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_junk_in_files_gives_a_traceback(custom, evaluation, config, label, sane, tmp_path):
    given_flags = flags(train_arguments(sane))
    (tmp_path / "c.yaml").write_text(json.dumps(custom))  # which YAML contains
    (tmp_path / "e.yaml").write_text(json.dumps(evaluation))
    (Path(given_flags["--hf-checkpoint"][0]) / "config.json").write_text(json.dumps(config))
    Path(given_flags["--prompt-data"][0]).write_text(
        json.dumps({"prompt": "1 + 1 = ? Answer: N", "label": label}) + "\n"
    )
    words = [*sane, "--custom-config-path", str(tmp_path / "c.yaml"), "--eval-config", str(tmp_path / "e.yaml")]
    command = parse_command(words)
    findings, fipo = check_command(command)
    effective_recipe(command, fipo)
    assert all("\n" not in finding.message for finding in findings)


@pytest.mark.parametrize("value", ["0", "-1"])
@pytest.mark.parametrize("flag", ["--global-batch-size", "--tensor-model-parallel-size", "--num-steps-per-rollout"])
def test_sizes_below_one_are_refused(flag, value, capsys):
    assert main([*dry_run(QWEN3_4B), flag, value]) == 2
    assert capsys.readouterr().out == f"error: argument {flag}: it is {value}; it must be at least 1\n"


QWEN3_30B_A3B = shlex.split(
    "--num-layers 48 --hidden-size 2048 --ffn-hidden-size 6144 --num-attention-heads 32 --num-query-groups 4"
    " --kv-channels 128 --vocab-size 151936 --untie-embeddings-and-output-weights --swiglu --group-query-attention"
    " --num-experts 128 --moe-ffn-hidden-size 768"
)
GLM45_AIR = shlex.split(
    "--num-layers 46 --hidden-size 4096 --ffn-hidden-size 10944 --num-attention-heads 96 --num-query-groups 8"
    " --kv-channels 128 --vocab-size 151552 --untie-embeddings-and-output-weights --swiglu --group-query-attention"
    " --num-experts 128 --moe-ffn-hidden-size 1408 --moe-shared-expert-intermediate-size 1408"
)


@pytest.mark.parametrize(
    ("arguments", "billions"),
    [
        ([*QWEN3_30B_A3B, "--moe-layer-freq", f"[{', '.join(['1'] * 48)}]"], 30.5),
        (QWEN3_30B_A3B, 30.5),
        ([*GLM45_AIR, "--moe-layer-freq", "[0]*1+[1]*45"], 106),
        ([*QWEN3_30B_A3B, "--moe-layer-freq", "[1]*7"], None),
        ([*QWEN3_30B_A3B, "--moe-layer-freq", "len('x')"], None),
    ],
)
def test_experts_count(arguments, billions):
    size = billions_of_parameters(parse_command(arguments).args)
    assert size == (None if billions is None else pytest.approx(billions, rel=0.03))


def test_the_papers_sizes_say_nothing_of_experts(sane, tmp_path):
    experts = [*sane, *QWEN3_30B_A3B, "--num-query-groups", "8", "--hf-checkpoint", str(tmp_path)]
    for preset in ("7b", "32b"):
        assert not [m for m in messages([*without(experts, FIPO_FLAGS), "--fipo-preset", preset]) if "wants" in m]


@pytest.mark.slime
def test_no_flag_of_slimes_is_a_misspelling(slime_root):
    """Nor of Megatron's, if that is at hand: those that their sources add by name."""
    sources = [slime_root / "slime" / "utils" / "arguments.py"]
    if os.environ.get("MEGATRON_ROOT"):
        sources.append(Path(os.environ["MEGATRON_ROOT"]) / "megatron" / "training" / "arguments.py")
    real = {name for file in sources for name in re.findall(r"""['"](--[a-z][\w-]+)['"]""", file.read_text())}
    assert len(real) > 200
    judged = {f"--{name.replace('_', '-')}" for name in vars(parse_command([]).args)}
    command = parse_command(sorted(real - judged))
    assert command.misspelt == command.misspelt_own == ()


def test_the_effective_recipe_stands_beside_the_papers(tmp_path):
    words = command_of(MATH_7B, tmp_path)
    provide_files(words)
    command = parse_command(words)
    heading, rows = effective_recipe(command, check_command(command)[1])
    assert heading == "paper, 7B FIPO"
    table = {name: (ours, paper) for name, ours, paper in rows}
    assert table["optimizer steps per rollout"] == ("8", "8")
    assert table["tokens per step, at most"] == ("20,971,520", "20,971,520")
    assert table["learning-rate warm-up"] == ("10 rollouts (80 steps)", "10 rollouts")
    assert table["half-life of Future-KL"] == ("32 tokens (γ = 0.9786)", "32 tokens")
    assert table["influence weights"] == ("[0.8, 1.2]", "[0.8, 1.2]")
    assert table["shift measured from"] == ("trainer's log-probs (recomputed)", "trainer's log-probs")
    differing = [name for name, (ours, paper) in table.items() if not ours.startswith(paper)]
    assert differing == ["model"]

    baseline = parse_command(command_of(QWEN_32B, tmp_path, LOSS="policy_loss"))
    heading, rows = effective_recipe(baseline, None)
    assert heading == "paper, 32B DAPO baseline"
    assert {name: ours for name, ours, paper in rows if ours != paper} == {
        "model": "about 32.8B",
        "learning-rate warm-up": "10 rollouts (160 steps)",
        "dual clip": "10 (slime main; v0.3.x ignores it)",
    }


def test_where_the_shift_comes_from():
    def source(*arguments: str) -> str:
        words = [*train_arguments(dry_run(QWEN3_4B)), *arguments]
        command = parse_command(words)
        return dict((row[0], row[1]) for row in effective_recipe(command, check_command(command)[1])[1])[
            "shift measured from"
        ]

    assert source() == "SGLang's log-probs (with engine mismatch)"
    assert source("--fipo-shift-from", "train") == "trainer's log-probs (ratio from SGLang's)"


def test_as_a_command(tmp_path):
    words = command_of(QWEN3_4B, tmp_path)
    provide_files(words)

    def run(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "slime_fipo.cli", "check", *arguments],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
        )

    good = run("--no-slime-parser", "--", *words)
    assert good.returncode == 0 and "0 errors, 0 warnings" in good.stdout, good.stdout + good.stderr
    assert "slime's parser was not asked" in good.stdout
    bad = run("--no-slime-parser", "--", *words, "--global-batch-size", "512")
    assert bad.returncode == 1 and "error: one optimizer step per rollout" in bad.stdout
    assert run("--", *words, "--num-layers", "x").returncode == 2


def test_file_names_are_not_markup(tmp_path, capsys):
    words = command_of(QWEN3_4B, tmp_path)
    provide_files(words)
    main([*words, "--prompt-data", str(tmp_path / "[red]no[/red].jsonl")])
    assert "[red]no[/red].jsonl does not exist" in capsys.readouterr().out


def test_slices_of_data_are_slimes(tmp_path):
    words = command_of(QWEN3_4B, tmp_path)
    provide_files(words)
    data = flags(train_arguments(words))["--prompt-data"][0]
    assert check_command(parse_command([*words, "--prompt-data", f"{data}@[0:100]"]))[0] == []


def test_flags_of_slime_that_are_not_judged_are_no_misspellings():
    for name in ("--eval-top-k", "--adam-beta1", "--sglang-mem-fraction-static", "--rollout-seed", "--no-load-optim"):
        assert parse_command([*train_arguments(dry_run(QWEN3_4B)), name, "1"]).misspelt == ()
