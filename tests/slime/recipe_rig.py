"""Calls the recipes through slime's own code, the way a run does: ``python -m tests.slime.recipe_rig OUT.json``.

A program of its own, with one slime version on the path. slime's reward hub, its dynamic-filter call, and its two
logging functions are the real ones; metrics are read back from a real TensorBoard directory.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from argparse import Namespace
from pathlib import Path

from slime.rollout.filter_hub.base_types import call_dynamic_filter
from slime.rollout.rm_hub import async_rm, batched_async_rm
from slime.utils.misc import load_function
from slime.utils.types import Sample

from slime_fipo.check.derived import OUR_FILTER, OUR_REWARD

try:
    from slime.observability.rollout_metrics import log_eval_rollout_data, log_rollout_data
except ModuleNotFoundError:  # v0.3.x
    from slime.ray.rollout import _log_eval_rollout_data as log_eval_rollout_data
    from slime.ray.rollout import _log_rollout_data as log_rollout_data

ARGS = dict(
    advantage_estimator="grpo",
    custom_eval_rollout_log_function_path="slime_fipo.recipes.evaluation.log_eval_rollout_data",
    custom_reward_post_process_path=None,
    custom_rm_path=OUR_REWARD,
    custom_rollout_log_function_path="slime_fipo.recipes.rollout_metrics.log_rollout_data",
    eval_reward_key="acc",
    global_batch_size=4,
    grpo_std_normalization=True,
    load_debug_rollout_data=None,
    log_passrate=False,
    log_reward_category=None,
    n_samples_per_eval_prompt=4,
    n_samples_per_prompt=4,
    overlong_buffer_len=40,
    overlong_penalty_factor=1.0,
    reward_key="score",
    rewards_normalization=True,
    rm_type=None,
    rollout_batch_size=2,
    rollout_max_response_len=100,
    rollout_num_gpus=1,
    sglang_speculative_algorithm=None,
    tb_experiment_name="rig",
    tb_project_name="rig",
    use_tensorboard=True,
    use_wandb=False,
    wandb_always_use_train_step=False,
)


def sample(answer: str | None, length: int, index: int = 0, group: int = 0, label: str = "34") -> Sample:
    return Sample(
        group_index=group,
        index=index,
        prompt="What is 17 + 17?",
        response="I have no idea." if answer is None else f"Let me think.\nAnswer: \\boxed{{{answer}}}",
        response_length=length,
        tokens=[0] * (length + 3),
        label=label,
        status=Sample.Status.COMPLETED,
    )


def rewarded(args: Namespace, *samples: Sample) -> list[Sample]:
    async def score():
        for one in samples:
            one.reward = await async_rm(args, one)

    asyncio.run(score())
    return list(samples)


def logged(directory: Path) -> dict[str, list[float]]:
    """Every scalar of a TensorBoard directory."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def main() -> None:
    out = Path(sys.argv[1])
    os.environ["TENSORBOARD_DIR"] = str(out.parent / "tensorboard")
    args = Namespace(**ARGS)
    results: dict = {}

    # Reward: right and wrong, inside the free length, in the buffer, and beyond.
    cases = {
        "short": ("34", 60),
        "halfway": ("34", 80),
        "full": ("34", 100),
        "beyond": ("34", 300),
        "wrong": ("35", 80),
    }
    cases["silent"] = (None, 10)
    results["rewards"] = {name: rewarded(args, sample(*case))[0].reward for name, case in cases.items()}
    plain = Namespace(**{k: v for k, v in ARGS.items() if not k.startswith("overlong")})
    results["without_buffer"] = rewarded(plain, sample("34", 300))[0].reward
    scored = rewarded(args, sample("34", 80))[0]
    results["raw_reward"] = scored.metadata["raw_reward"]
    results["batched"] = asyncio.run(batched_async_rm(args, [sample("34", 60), sample("1", 60)]))
    try:
        rewarded(args, sample("34", 10, label="\\frac{1}{2}"))
    except ValueError as error:
        results["label_error"] = str(error)

    # Group filter: by accuracy, whatever the penalty.
    function = load_function(OUR_FILTER)
    groups = {
        "mixed": [("34", 10), ("35", 10)],
        "all_right_other_lengths": [("34", 10), ("34", 95), ("34", 80)],
        "all_wrong_other_lengths": [("35", 10), (None, 100)],
        "mixed_equal_scores": [("34", 300), ("35", 300)],
    }
    results["filter"] = {}
    for name, group in groups.items():
        output = call_dynamic_filter(function, args, rewarded(args, *(sample(*one) for one in group)))
        results["filter"][name] = [bool(output.keep), output.reason]
    try:
        function(args, [Sample(index=7, reward=1.0)])
    except ValueError as error:
        results["filter_error"] = str(error)
    aborted = [*rewarded(args, sample("34", 10)), Sample(index=1, status=Sample.Status.ABORTED)]
    results["filter"]["aborted"] = [bool(function(args, aborted).keep), function(args, aborted).reason]
    try:
        for _ in range(10**6):
            function(args, aborted)
    except RuntimeError as error:
        results["only_aborted"] = str(error)

    # Evaluation: two problems of four samples; the first is solved by majority, the second by one sample in four.
    answers = ["34", "34", "35", "34", "34", "35", "35", "36"]
    evaluated = rewarded(args, *(sample(answer, 50, index=i) for i, answer in enumerate(answers)))
    data = {
        "aime24": {
            "rewards": [one.reward["acc"] for one in evaluated],
            "truncated": [False] * len(evaluated),
            "samples": evaluated,
        }
    }
    log_eval_rollout_data(3, args, data, None)

    # Rollout: one right answer of 90 tokens (score 0.25), three wrong ones of 10 (score -1); one more group,
    # that the second look alone found right, and whose last response is not trained on.
    first = [sample("34", 90), *(sample("35", 10) for _ in range(3))]
    second = [sample("034", 20, group=1) for _ in range(4)]
    second[-1].remove_sample = True
    for i, one in enumerate(first + second):
        one.index = i
    log_rollout_data(3, args, rewarded(args, *first, *second), None, 1.0)

    results["scalars"] = logged(out.parent / "tensorboard")
    out.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
