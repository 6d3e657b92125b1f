"""Records of a rollout that goes through slime's own hands on CPU: the rollout manager's split over data-parallel
ranks, the training actor's reading of it, its iterator of micro-batches and its ``loss_function``. A program of its
own, as ``rig.py``: ``python -m tests.slime.record_rig OUT WORLD...`` writes ``OUT/WORLD`` with the records and
``OUT/WORLD.pt`` with what the loss was multiplied by, and with the gradients with and without recording.
"""

from __future__ import annotations

import logging
import sys
from argparse import Namespace
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import ray
import torch
import torch.distributed as dist
from megatron.core import mpu
from slime.backends.megatron_utils import cp_utils, data
from slime.backends.megatron_utils import loss as slime_loss
from slime.ray.rollout import RolloutManager
from slime.utils.data import process_rollout_data
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from slime_fipo.plugin import loss as fipo_loss
from slime_fipo.plugin import recorder

from . import micro_batch
from .cases import Case
from .rig import World, run_world

PROMPTS, SAMPLES_PER_PROMPT, GLOBAL_BATCH, ROLLOUT = 6, 4, 8, 20
STEPS = PROMPTS * SAMPLES_PER_PROMPT // GLOBAL_BATCH

WORLDS = {
    "cp1": World(),
    "cp2": World(cp=2),
    "cp4": World(cp=4),
    "dp2": World(dp=2),
    "dp2_cp2": World(dp=2, cp=2),
    "tp2": World(tp=2),
}


@dataclass(frozen=True)
class Run:
    """How the rollout is trained: slime's flags and ours."""

    name: str
    args: dict
    samples: int | None = None


RUNS = (
    Run("static", dict(micro_batch_size=2)),
    Run("dynamic", dict(use_dynamic_batch_size=True, max_tokens_per_gpu=80)),
    Run("balanced", dict(micro_batch_size=1, balance_data=True)),
    Run("recompute", dict(micro_batch_size=2, recompute_loss_function=True)),
    Run("rollout_logprobs", dict(micro_batch_size=2, use_rollout_logprobs=True)),
    Run("few", dict(micro_batch_size=2), samples=8),
)


def namespace(folder: Path | None, run: Run) -> Namespace:
    settings = dict(
        balance_by_flops=False,
        balance_data=False,
        global_batch_size=GLOBAL_BATCH,
        micro_batch_size=None,
        n_samples_per_prompt=SAMPLES_PER_PROMPT,
        rollout_batch_size=PROMPTS,
        use_dynamic_batch_size=False,
        # balance_data asks for a model's shape
        ffn_hidden_size=64,
        hidden_size=16,
        kv_channels=4,
        num_attention_heads=4,
        num_experts=None,
        num_layers=2,
        num_query_groups=4,
        q_lora_rank=None,
        vocab_size=micro_batch.VOCABULARY,
        fipo_preset="7b",
        hf_checkpoint="/models/policy",
    )
    if folder is not None:
        settings |= dict(fipo_record=str(folder), fipo_record_interval=10, fipo_record_samples=run.samples)
    return Case().namespace(**settings | run.args)


def rollout_samples() -> micro_batch.Samples:
    """24 responses: those of ``micro_batch`` over and over, with other lengths."""
    kinds = [(p, n + 3 * (i // 10), *rest) for i in range(24) for p, n, *rest in [micro_batch.RESPONSES[i % 10]]]
    return micro_batch.make_samples(tuple(kinds), shift_in_rollout=False)


def split_over_ranks(args: Namespace, samples: micro_batch.Samples, world: World) -> list:
    """slime's own schedule and shipment, through a Ray that hands objects over as they are."""
    ray.put, ray.get = (lambda value, **_: value), (lambda value: value)
    manager = Namespace(
        args=args,
        train_parallel_config=dict(
            dp_size=world.dp, cp_size=world.cp, vpp_size=1, microbatch_group_size_per_vp_stage=1
        ),
    )
    n = len(samples.tokens)
    masks = [mask.tolist() for mask in samples.loss_masks]
    ids, sums = list(range(1000, 1000 + n)), [sum(mask) for mask in masks]
    shipped = dict(
        tokens=[tokens.tolist() for tokens in samples.tokens],
        response_lengths=list(samples.responses),
        rewards=[0.5 * i for i in range(n)],
        raw_reward=[float(i) for i in range(n)],
        truncated=[0] * n,
        sample_indices=ids,
        rollout_ids=ids,
        group_ids=ids,
        loss_masks=masks,
        rollout_mask_sums=sums,
        group_mask_sums=sums,
        rollout_log_probs=[values.tolist() for values in samples.rollout_log_probs],
    )
    return RolloutManager.__ray_metadata__.modified_class._split_train_data_by_dp(manager, shipped)


def rollout_data_of_rank(args: Namespace, samples: micro_batch.Samples, world: World) -> tuple[dict, list[int]]:
    """What the actor has when it calls ``--rollout-data-postprocess-path``, and this rank's responses."""
    refs = split_over_ranks(args, samples, world)
    own = list(refs[mpu.get_data_parallel_rank()].inner["partition"])  # before releases that drop it do
    rollout = process_rollout_data(args, refs, mpu.get_data_parallel_rank(), world.dp)
    some = [(samples.totals[i], samples.responses[i]) for i in own]

    def local(values: list[Tensor]) -> list[Tensor]:
        return [cp_utils.slice_log_prob_with_cp(values[i], *n) for i, n in zip(own, some, strict=True)]

    rollout["tokens"] = [torch.as_tensor(tokens).long() for tokens in rollout["tokens"]]
    rollout["loss_masks"] = [torch.as_tensor(mask).int() for mask in rollout["loss_masks"]]
    for key in ("rollout_mask_sums", "group_mask_sums"):
        if key in rollout:
            rollout[key] = [torch.as_tensor(float(value)) for value in rollout[key]]
    rollout["advantages"] = local(samples.advantages)
    rollout["log_probs"] = local(samples.train_log_probs)
    rollout["rollout_log_probs"] = local(samples.rollout_log_probs)
    if args.use_rollout_logprobs:
        del rollout["log_probs"]  # slime then has none
    return rollout, own


KEYS = ("tokens", "loss_masks", "total_lengths", "response_lengths", "advantages", "log_probs", "rollout_log_probs")
DENOMINATORS = ("rollout_mask_sums", "group_mask_sums")


def train(args: Namespace, samples: micro_batch.Samples, world: World, rollout_id: int) -> dict:
    """A rollout's steps as the actor and ``train_one_step`` call us; gradients by step, and weights by position."""
    rollout, own = rollout_data_of_rank(args, samples, world)
    if getattr(args, "fipo_record", None) is not None:
        recorder.rollout_data_hook(args, rollout_id, rollout)
    [iterator] = data.get_data_iterator(rollout)
    gradients, multiplied, metrics = [], {}, []
    original = fipo_loss.fipo_weights

    def seen(*inputs, **options):
        result = original(*inputs, **options)
        parts = result.weights.split(inputs[4])
        multiplied.update(zip([own[i] for i in indices], [part.clone() for part in parts], strict=True))
        return result

    fipo_loss.fipo_weights = seen
    for step, count in enumerate(rollout["num_microbatches"]):
        fipo_loss.before_train_step_hook(args, rollout_id, step, None, None, None)
        leaf = samples.logits.clone().requires_grad_()
        for _ in range(count):
            indices = iterator.micro_batch_indices[iterator.offset]
            batch = iterator.get_next([*KEYS, *DENOMINATORS])
            batch["unconcat_tokens"] = batch["tokens"]
            part, rows = micro_batch.select(samples, [own[i] for i in indices], leaf)
            _, logits = micro_batch.slime_batch(args, part, rows, [])
            batch |= dict.fromkeys(("rollout_top_p_token_ids", "rollout_top_p_token_offsets"))
            loss, _, log = slime_loss.loss_function(args, batch, count, GLOBAL_BATCH, logits)
            loss.backward()
            metrics.append(log["values"].tolist())
        gradients.append(leaf.grad)
    fipo_loss.fipo_weights = original
    return {"gradients": gradients, "multiplied": multiplied, "metrics": metrics}


def show_in_wandb(samples: micro_batch.Samples, world: World, folder: Path) -> None:
    """A recorded rollout in the run that slime opens on the rank that logs, without a network."""
    try:
        from slime.observability.logging_utils import finish_tracking, init_tracking
    except ImportError:  # before main's observability package
        from slime.utils.logging_utils import finish_tracking, init_tracking
    args = namespace(folder / "records", RUNS[0])
    vars(args).update(
        fipo_record_wandb=True,
        megatron_config_path=None,
        use_wandb=True,
        wandb_dir=str(folder),
        wandb_key=None,
        wandb_mode="offline",
        wandb_project="records",
        wandb_run_id="shared",
        wandb_team=None,
    )
    if recorder.is_main_rank():
        init_tracking(args, primary=False, role="actor")
    train(args, samples, world, ROLLOUT)
    if recorder.is_main_rank():
        finish_tracking(args)


class Operations(TorchDispatchMode):
    """Counts what torch is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations(args: Namespace, samples: micro_batch.Samples, world: World, rollout_id: int) -> int:
    with Operations() as counted:
        train(args, samples, world, rollout_id)
    return counted.count


def failures(samples: micro_batch.Samples, world: World, out: Path) -> dict:
    """What is logged, and whether training went on, where records cannot be written or their places are not known."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda entry: messages.append(entry.getMessage())
    recorder.logger.addHandler(handler)
    recorder.logger.propagate = False
    run = RUNS[0]
    plain = train(namespace(None, run), samples, world, ROLLOUT)
    blocked = out / "blocked"
    blocked.write_text("a file where the folder should be")
    results = {}
    args = namespace(blocked, run)
    for rollout_id in (ROLLOUT, ROLLOUT + 10):
        trained = train(args, samples, world, rollout_id)
        same = all(map(torch.equal, trained["gradients"], plain["gradients"]))
    results["blocked"] = {"messages": list(messages), "same": same}
    messages.clear()
    args = namespace(out / "fewer_prompts", run)
    args.rollout_batch_size = PROMPTS - 2  # so some responses are parts of others
    train(args, samples, world, ROLLOUT)
    results["parts"] = {"messages": list(messages), "files": (out / "fewer_prompts").exists()}
    recorder._steps = None
    args = namespace(out / "no_hook", run)
    for step_id in (None, 0):
        args.fipo_step_id = step_id
        try:
            recorder.recorder_of_step(args)
        except ValueError as error:
            results.setdefault("hooks", []).append(str(error))
    return results


def run_rank(name: str, out: Path) -> list[dict]:
    world, samples = WORLDS[name], rollout_samples()
    torch.compiler.set_stance("force_eager")
    results = {}
    for run in RUNS:
        folder = out / name / run.name
        off = train(namespace(None, run), samples, world, ROLLOUT)
        on = train(namespace(folder, run), samples, world, ROLLOUT)
        results[run.name] = {
            "same_gradients": all(map(torch.equal, on["gradients"], off["gradients"])),
            "same_metrics": on["metrics"] == off["metrics"],
            "same_weights": all(torch.equal(on["multiplied"][i], off["multiplied"][i]) for i in off["multiplied"]),
            "multiplied": on["multiplied"],
        }
    if name == "cp1":
        idle = namespace(out / "idle", RUNS[0])
        results["operations"] = {
            "off": operations(namespace(None, RUNS[0]), samples, world, ROLLOUT),
            "not_this_rollout": operations(idle, samples, world, ROLLOUT + 1),
            "recorded": operations(idle, samples, world, ROLLOUT),
        }
        results["failures"] = failures(samples, world, out)
    if name in ("cp1", "dp2_cp2"):
        show_in_wandb(samples, world, out / f"wandb-{name}")
    gathered = [None] * world.size
    dist.all_gather_object(gathered, results)
    return gathered


def main() -> None:
    out, *names = sys.argv[1:]
    out = Path(out)
    failed = [name for name in names if not run_world(WORLDS[name], out, name, partial(run_rank, name, out))]
    if failed:
        sys.exit(f"ranks failed in {', '.join(failed)}")


if __name__ == "__main__":
    main()
