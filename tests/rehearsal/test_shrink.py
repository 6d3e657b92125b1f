"""A launch script's command made small: what has to hold of it for every script, and what is left alone."""

from itertools import chain
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from slime_fipo.check.command import parse_command
from slime_fipo.check.derived import data_parallel_size
from slime_fipo.errors import UserError
from slime_fipo.rehearsal.shrink import NUM_ROLLOUT, RESPONSE_LEN, Shrunk, first_rows, resume, shrink
from slime_fipo.rehearsal.small_model import SmallModel

from ..scripts.bash import LAUNCH_SCRIPTS, LOSSES, dry_run

MODEL = SmallModel(Path("/small"), {"--num-layers": "2", "--hidden-size": "64"}, ("--attention-output-gate",), [], None)
QWEN3 = next(script for script in LAUNCH_SCRIPTS if script.stem == "run-qwen3-4B")


def small(folder, script=QWEN3, *arguments: str, **variables: str) -> Shrunk:
    return shrink(parse_command(dry_run(script, *arguments, **variables)), MODEL, folder)


def parsed(arguments: list[str]):
    return parse_command(["python3", "-m", "slime_fipo", "/root/slime/train.py", *arguments]).args


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("script", LAUNCH_SCRIPTS, ids=lambda script: script.stem)
def test_every_launch_script_becomes_a_small_run_of_the_same_kind(tmp_path, script, loss):
    given_args = parse_command(dry_run(script, LOSS=loss)).args
    shrunk = small(tmp_path, script, LOSS=loss)
    args = parsed(shrunk.arguments)
    for name in ("tensor_model_parallel_size", "context_parallel_size"):
        assert getattr(args, name) == min(2, getattr(given_args, name))
    assert args.pipeline_model_parallel_size == 1
    assert data_parallel_size(args) == min(2, data_parallel_size(given_args))
    assert shrunk.gpus == args.actor_num_gpus_per_node + 1
    samples = args.rollout_batch_size * args.n_samples_per_prompt
    assert samples == args.global_batch_size * shrunk.steps_per_rollout
    assert args.global_batch_size % data_parallel_size(args) == 0
    assert shrunk.steps_per_rollout == 2  # weights can move
    assert args.num_rollout == NUM_ROLLOUT and args.rollout_max_response_len == RESPONSE_LEN
    # What is the user's own, and what must not be touched.
    for name in ("loss_type", "fipo_preset", "eps_clip_high", "custom_rm_path", "reward_key", "use_rollout_logprobs"):
        assert getattr(args, name, None) == getattr(given_args, name, None), name
    assert Path(args.save).is_relative_to(tmp_path)
    assert given_args.save not in shrunk.arguments
    assert args.hf_checkpoint == args.load == str(MODEL.folder)
    for flag in ("--colocate", "--recompute-granularity", "--lr-warmup-iters", "--save-retain-interval"):
        assert flag not in shrunk.arguments, flag
    assert not set(MODEL.removed_flags) & set(shrunk.arguments)


def test_the_second_run_continues_from_the_first_ones_checkpoint(tmp_path):
    first = small(tmp_path)
    args = parsed(resume(first, tmp_path))
    assert args.load == str(tmp_path / "checkpoint") == first.given("--save")[0]
    assert args.num_rollout == NUM_ROLLOUT + 1
    assert "--save" not in resume(first, tmp_path)
    assert "--eval-interval" not in resume(first, tmp_path)


def test_every_change_is_in_the_table(tmp_path):
    shrunk = small(tmp_path)
    rows = {change.what: (change.given, change.rehearsed) for change in shrunk.changes}
    assert rows["--n-samples-per-prompt"] == ("16", "4")
    assert rows["a rollout"] == ("512 samples in 8 steps", "16 samples in 2 steps")
    assert rows["--colocate"][1].startswith("left out")


def test_a_yaml_file_keeps_what_was_not_changed_here(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("eps_clip: 0.3\nnum_rollout: 4000\nlr: 0.5\n")
    shrunk = small(tmp_path, QWEN3, "--custom-config-path", str(file))
    copy = Path(shrunk.given("--custom-config-path")[0])
    assert copy != file and yaml.safe_load(copy.read_text()) == {"eps_clip": 0.3}
    assert "num_rollout: 4000" in file.read_text()


@pytest.mark.parametrize("flags", [("--debug-rollout-only",), ("--advantage-estimator", "ppo")])
def test_what_cannot_be_rehearsed_is_refused(tmp_path, flags):
    with pytest.raises(UserError, match=flags[0]):
        small(tmp_path, QWEN3, *flags)


@given(st.integers(0, 50), st.integers(0, 50) | st.none(), st.integers(1, 20))
def test_first_rows_are_rows_of_what_was_named(start, count, most):
    stop = None if count is None else start + count
    path = f"data.jsonl@[{start}:{'' if stop is None else stop}]"
    rows = range(200)
    file, _, bounds = first_rows(path, most).partition("@")
    first, last = bounds.strip("[]").split(":")
    assert file == "data.jsonl"
    assert list(rows[int(first) : int(last)]) == list(rows[start:stop])[:most]


values_ = st.lists(st.sampled_from(["1", "two", "-3"]), max_size=3)
flag_words = st.tuples(st.sampled_from(["--a", "--b", "--c"]), values_).map(lambda pair: [pair[0], *pair[1]])
words = st.lists(flag_words | st.sampled_from([["--a=2"], ["--c=1"]]), max_size=6).map(
    lambda parts: list(chain.from_iterable(parts))
)


@given(words, values_)
def test_setting_a_flag_leaves_the_others_alone(arguments, values):
    shrunk = Shrunk(list(arguments))
    others = {flag: Shrunk(list(arguments)).given(flag) for flag in ("--b", "--c")}
    shrunk.set("--a", *values)
    assert shrunk.given("--a") == values
    assert sum(word.partition("=")[0] == "--a" for word in shrunk.arguments) == 1
    assert {flag: shrunk.given(flag) for flag in others} == others
