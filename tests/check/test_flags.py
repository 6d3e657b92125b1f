"""``slime-fipo check`` on flags that slime ignores or refuses: other frameworks', evaluation, lengths, checkpoints."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slime_fipo.check.command import parse_command
from slime_fipo.check.foreign_flags import REPLACEMENTS

from ..scripts.bash import dry_run
from .commands import HF, QWEN3_4B, TRACKER, Broken, expect, flag, messages, without

FULLY_ASYNC = "slime.rollout.fully_async_rollout.generate_rollout_fully_async"
SFT = "slime.rollout.sft_rollout.generate_rollout"
DEFAULT = "slime.rollout.sglang_rollout.generate_rollout"
CONTINUED = {"run/latest_checkpointed_iteration.txt": "4"}

BROKEN = {
    **{
        f"another framework's {given}": Broken(f"{given} is another framework's flag", use, flag(given, "1"))
        for given, use in {
            "--eps-clip-low": "use --eps-clip,",
            "--learning-rate": "use --lr",
            "--learning_rate": "use --lr",
            "--num-iterations": "--num-steps-per-rollout",
            "--over-sample-batch-size": "use --over-sampling-batch-size",
            "--custom-reward-function-path": "use --custom-rm-path",
            "--ppo_mini_batch_size": "use --global-batch-size",
            "--gpu-memory-utilization": "use --sglang-mem-fraction-static",
            "--num_generations": "use --n-samples-per-prompt",
        }.items()
    },
    "evaluation by a rollout function that only trains": Broken(
        f"--rollout-function-path {FULLY_ASYNC} cannot evaluate",
        "drop --eval-interval",
        flag("--rollout-function-path", FULLY_ASYNC),
    ),
    "evaluation function that only trains": Broken(
        f"--eval-function-path {SFT} cannot evaluate", "drop --eval-interval", flag("--eval-function-path", SFT)
    ),
    "group reward with evaluation": Broken("--group-rm", "drop --eval-interval", flag("--group-rm")),
    "context no longer than the prompt": Broken(
        "--rollout-max-context-len 2048 leaves no token for a response",
        "use more than 2048",
        flag("--rollout-max-context-len", "2048"),
    ),
    "KL loss without a reference": Broken(
        "--use-kl-loss needs the reference model",
        "add it",
        flag("--use-kl-loss", "--kl-loss-coef", "0.001", "--load", "FILE:run", "--save", "FILE:run"),
        ("--ref-load",),
        write=CONTINUED,
    ),
    "KL reward with a reference that is not there": Broken(
        "--kl-coef 0.1 needs the reference model",
        "check the path",
        flag("--kl-coef", "0.1", "--load", "FILE:run", "--save", "FILE:run"),
        file=(TRACKER, None),
        write=CONTINUED,
    ),
    "all-gather CP of a dense model": Broken(
        "--allgather-cp", "drop it", flag("--allgather-cp", "--context-parallel-size", "2")
    ),
    "layers that do not divide": Broken(
        "--pipeline-model-parallel-size 8 does not divide --num-layers 36",
        "--decoder-last-pipeline-num-layers",
        flag("--pipeline-model-parallel-size", "8", "--tensor-model-parallel-size", "1", "--actor-num-nodes", "1"),
        error=False,
    ),
    "rotary base of another release": Broken(
        "--rotary-base 1000000 is not the 5000000",
        "set MODEL_ARGS_ROTARY_BASE=5000000 before sourcing the model's script, or add --rotary-base 5000000",
        file=(f"{HF}/config.json", '{"model_type": "qwen3", "rope_theta": 5000000, "head_dim": 128}'),
    ),
    "rotary base of a model without that variable": Broken(
        "--rotary-base 1000000 is not the 5000000",
        "; add --rotary-base 5000000",
        file=(f"{HF}/config.json", '{"model_type": "llama", "rope_theta": 5000000, "head_dim": 128}'),
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_finds_the_planted_fault(name, tmp_path, capsys):
    expect(BROKEN[name], tmp_path, capsys)


SILENT = {
    "fully asynchronous without evaluation": (("--eval-interval",), ("--rollout-function-path", FULLY_ASYNC)),
    "fully asynchronous with an evaluation of its own": (
        (),
        ("--rollout-function-path", FULLY_ASYNC, "--eval-function-path", DEFAULT),
    ),
    "group reward without evaluation": (("--eval-interval",), ("--group-rm",)),
    "group reward with an evaluation of one's own": ((), ("--group-rm", "--eval-function-path", "my.evaluation")),
    "context for one token": ((), ("--rollout-max-context-len", "2049")),
    "uneven stages that are spelt out": (
        ("--tensor-model-parallel-size",),
        ("--pipeline-model-parallel-size", "8", "--decoder-last-pipeline-num-layers", "1"),
    ),
}


@pytest.mark.parametrize("name", SILENT)
def test_silent_on_what_works(name, sane):
    drop, add = SILENT[name]
    assert messages([*without(sane, drop), *add]) == []


def test_all_gather_cp_of_sparse_attention_is_no_fault(sane):
    config = f"{sane[sane.index('--hf-checkpoint') + 1]}/config.json"
    with open(config, "w") as file:
        file.write('{"architectures": ["GlmMoeDsaForCausalLM"]}')
    assert messages([*sane, "--allgather-cp", "--context-parallel-size", "2"]) == []


def spelt(name: str, underscores: bool, upper: bool, joined: bool) -> list[str]:
    name = name.replace("-", "_") if underscores else name
    name = f"--{name.upper() if upper else name}"
    return [f"{name}=1"] if joined else [name, "1"]


@given(st.sampled_from(sorted(REPLACEMENTS)), st.booleans(), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_other_frameworks_flags_in_every_spelling(name, underscores, upper, joined):
    words = spelt(name, underscores, upper, joined)
    command = parse_command([*dry_run(QWEN3_4B), *words])
    assert command.foreign == ((words[0].partition("=")[0], REPLACEMENTS[name]),)
    assert command.misspelt == ()


@pytest.mark.parametrize("spelling", ["--save-interval", "--top-kk", "--epsilon-greedy", "--beta1"])
def test_near_names_are_not_taken_for_them(spelling):
    assert parse_command([*dry_run(QWEN3_4B), spelling, "1"]).foreign == ()


def test_the_reference_is_not_asked_for_without_a_kl_term(sane, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("4")
    run = str(tmp_path / "run")
    assert messages([*without(sane, ("--ref-load",)), "--load", run, "--save", run]) == []
