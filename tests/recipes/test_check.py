"""``slime-fipo check``: a table of broken commands, each found by flag and fix; our own scripts pass."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from slime_fipo.recipes.check import OUR_FILTER, OUR_REWARD, check_command, effective_recipe, main
from slime_fipo.recipes.command import parse_command

from ..scripts.bash import EXAMPLES, LAUNCH_SCRIPTS, LOSSES, dry_run, flags, train_arguments

REPOSITORY = Path(__file__).resolve().parents[2]
QWEN3_4B = EXAMPLES / "run-qwen3-4B.sh"
MATH_7B = EXAMPLES / "run-qwen2.5-math-7B.sh"
QWEN_32B = EXAMPLES / "run-qwen2.5-32B.sh"
QWEN35_9B = EXAMPLES / "run-qwen3.5-9B.sh"

PROMPT = {"prompt": [{"role": "user", "content": "1 + 1"}], "label": "2"}


def provide_files(words: list[str], positions: int = 32768) -> None:
    """Data and checkpoints at the paths of a command, with a Hugging Face configuration that fits its flags."""
    given = flags(train_arguments(words))
    for path in [*given["--prompt-data"], *given["--eval-prompt-data"][1::2]]:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(PROMPT) + "\n")
    (reference := Path(given["--ref-load"][0])).mkdir(parents=True)
    (reference / "latest_checkpointed_iteration.txt").write_text("release")
    (checkpoint := Path(given["--hf-checkpoint"][0])).mkdir(parents=True)
    config = {
        "num_hidden_layers": int(given["--num-layers"][0]),
        "hidden_size": int(given["--hidden-size"][0]),
        "intermediate_size": int(given["--ffn-hidden-size"][0]),
        "num_attention_heads": int(given["--num-attention-heads"][0]),
        "num_key_value_heads": int(given["--num-query-groups"][0]),
        "rms_norm_eps": float(given["--norm-epsilon"][0]),
        "rope_theta": float(given["--rotary-base"][0]),
        "tie_word_embeddings": "--untie-embeddings-and-output-weights" not in given,
        "max_position_embeddings": positions,
    }
    if "--spec" in given:  # Qwen3.5's configuration has the text model inside
        config = {"text_config": {**config, "rope_parameters": {"rope_theta": config.pop("rope_theta")}}}
    (checkpoint / "config.json").write_text(json.dumps(config))


def command_of(script: Path, root: Path, **variables: str) -> list[str]:
    words = dry_run(script, MODEL_ROOT="/ROOT/models", DATA_ROOT="/ROOT/data", **variables)  # one dry run for all roots
    return [word.replace("/ROOT/", f"{root}/") for word in words]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("script", LAUNCH_SCRIPTS, ids=lambda s: s.stem)
def test_silent_on_our_own_scripts(script, loss, tmp_path):
    for logprobs in ("rollout", "train"):
        words = command_of(script, tmp_path / logprobs, LOSS=loss, LOGPROBS=logprobs)
        provide_files(words)
        assert check_command(parse_command(words))[0] == []
        assert check_command(parse_command(train_arguments(words)))[0] == [], "the arguments alone will do"


@dataclass(frozen=True)
class Broken:
    """A working launch script's command with one fault: flags put behind it, taken out, or a file changed."""

    names: str
    fix: str
    add: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    file: tuple[str, str | None] | None = None  # path below the root: its text, or None for a missing one
    script: Path = QWEN3_4B
    variables: dict = field(default_factory=dict)
    error: bool = True
    tool: tuple[str, str] | None = None  # a word of the command, and what stands in its place


def flag(*words: str) -> tuple[str, ...]:
    return words


HF, REF, DATA = "models/Qwen3-4B-Base", "models/Qwen3-4B-Base_torch_dist", "data/dapo-math-17k/dapo-math-17k.jsonl"
TRACKER = f"{REF}/latest_checkpointed_iteration.txt"

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
        "--global-batch-size 2 does not divide over 4", "a multiple of 4", flag("--global-batch-size", "2")
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
        flag("--rm-type", "deepscaler"),
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
        drop=("--use-rollout-logprobs",),
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
    "misspelt FIPO flag": Broken("--fipo-decayrate", "did you mean --fipo-decay-rate?", flag("--fipo-decayrate", "64")),
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
        "--input-key prompt is not in every row", "question", file=(DATA, '{"question": "1 + 1", "label": "2"}\n')
    ),
    "data without labels": Broken(
        "--label-key label is not in every row", "answer", file=(DATA, '{"prompt": "1 + 1", "answer": "2"}\n')
    ),
    "labels that DAPO cannot compare": Broken(
        "'\\\\frac{1}{2}'", "use other data", file=(DATA, '{"prompt": "1 / 2", "label": "\\\\frac{1}{2}"}\n')
    ),
    "data in another format": Broken(
        "neither .jsonl nor .parquet", "convert it", flag("--prompt-data", "FILE:data.csv")
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
        "source that model's script",
        file=(f"{HF}/config.json", '{"num_hidden_layers": 40, "tie_word_embeddings": true}'),
    ),
    "tied embeddings": Broken(
        "tied embeddings",
        "drop --untie-embeddings-and-output-weights",
        flag("--untie-embeddings-and-output-weights"),
    ),
    "resumes from elsewhere": Broken("--load", "give both the same folder", flag("--load", "/elsewhere"), error=False),
    "nothing saved": Broken("--save-interval needs --save", "add it", drop=("--save",)),
    "no number of rollouts": Broken("--num-rollout is missing", "--num-epoch", drop=("--num-rollout",)),
}
# Faults that break two rules at once.
TWO_FINDINGS = {"nothing saved", "one step by count", "batch does not divide"}


def without(words: list[str], flags_to_drop: tuple[str, ...]) -> list[str]:
    kept, dropping = [], False
    for word in words:
        if word.startswith("--"):
            dropping = word in flags_to_drop
        if not dropping:
            kept.append(word)
    return kept


def test_the_table_is_long_enough():
    assert len(BROKEN) >= 25


@pytest.mark.parametrize("name", BROKEN)
def test_finds_the_planted_fault(name, tmp_path, capsys):
    broken = BROKEN[name]
    words = command_of(broken.script, tmp_path, **broken.variables)
    provide_files(words)
    if broken.file is not None:
        path, text = broken.file
        assert (tmp_path / path).is_file()
        if text is None:
            (tmp_path / path).unlink()
        else:
            (tmp_path / path).write_text(text)
    (tmp_path / "data.csv").write_text("prompt,label\n")
    added = [word.replace("FILE:", f"{tmp_path}/") for word in broken.add]
    words = [*without(words, broken.drop), *added]
    if broken.tool is not None:
        words = [word.replace(*broken.tool) if word.endswith(broken.tool[0]) else word for word in words]

    findings, _ = check_command(parse_command(words))
    matching = [f for f in findings if broken.names in f.message and broken.fix in f.message]
    assert matching, findings
    assert [f.severity for f in matching] == ["error" if broken.error else "warning"]
    assert len(findings) <= (2 if name in TWO_FINDINGS else 1), findings
    assert "\n" not in matching[0].message

    status = main(words)
    assert status == int(broken.error)
    assert matching[0].message in capsys.readouterr().out


def test_the_effective_recipe_stands_beside_the_papers(tmp_path):
    words = command_of(MATH_7B, tmp_path)
    provide_files(words)
    command = parse_command(words)
    heading, rows = effective_recipe(command, check_command(command)[1])
    assert heading == "paper, 7B FIPO"
    table = {name: (ours, paper) for name, ours, paper in rows}
    assert table["optimizer steps per rollout"] == ("8", "8")
    assert table["tokens per step, at most"] == ("20,971,520", "20,971,520")
    assert table["half-life of Future-KL"] == ("32 tokens (γ = 0.9786)", "32 tokens")
    assert table["influence weights"] == ("[0.8, 1.2]", "[0.8, 1.2]")
    assert table["shift measured from"] == ("trainer's log-probs (recomputed)", "trainer's log-probs")
    differing = [name for name, (ours, paper) in table.items() if not ours.startswith(paper)]
    assert differing == ["model"]

    baseline = parse_command(command_of(QWEN_32B, tmp_path, LOSS="policy_loss"))
    heading, rows = effective_recipe(baseline, None)
    assert heading == "paper, 32B DAPO baseline"
    assert [name for name, ours, paper in rows if ours != paper] == ["model"]


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

    good = run("--", *words)
    assert good.returncode == 0 and "0 errors, 0 warnings" in good.stdout, good.stdout + good.stderr
    bad = run("--", *words, "--global-batch-size", "512")
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
    for given in ("--eval-top-k", "--adam-beta1", "--sglang-mem-fraction-static", "--rollout-seed", "--no-load-optim"):
        assert parse_command([*train_arguments(dry_run(QWEN3_4B)), given, "1"]).misspelt == ()
