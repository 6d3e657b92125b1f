"""Runs the cases through one slime checkout's real ``loss_function`` on CPU, in every parallel layout, and saves what
came out. A program of its own: ``python -m tests.slime.rig VERSION OUT WORLD...`` with slime on the path, so that each
slime version gets its own interpreter; the ranks are forked from it, after the imports, as gloo processes.
"""

from __future__ import annotations

import ast
import inspect
import logging
import os
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import mpu
from slime.backends.megatron_utils import cp_utils
from slime.backends.megatron_utils import loss as slime_loss
from slime.utils import ppo_utils
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from slime_fipo import fipo_policy_loss, fipo_weights
from slime_fipo.algorithm import fipo_config_from_args
from slime_fipo.algorithm.weights import METRICS
from slime_fipo.plugin import engine_noise
from slime_fipo.plugin import loss as fipo_loss

from ..algorithm.memory import peak_extra_bytes
from . import micro_batch
from .cases import CASES, UNIT_CASES, Case

try:
    from slime.observability.train_metric_utils import reduce_train_step_metrics
except ImportError:  # before main's observability package
    from slime.backends.megatron_utils.cp_utils import reduce_train_step_metrics


@dataclass(frozen=True)
class World:
    tp: int = 1
    cp: int = 1
    dp: int = 1
    micro_batches: int = 1

    @property
    def size(self) -> int:
        return self.tp * self.cp * self.dp


WORLDS = {
    "cp1": World(),
    "cp2": World(cp=2),
    "cp4": World(cp=4),
    "tp2": World(tp=2),
    "dp2": World(dp=2),
    "micro_batches": World(micro_batches=3),
    "compiled": World(),  # as slime runs it: its element-wise functions through torch.compile
}


def samples_of(case: Case) -> micro_batch.Samples:
    args = case.namespace()
    responses = {
        "responses": micro_batch.RESPONSES,
        "prompt_heavy": micro_batch.PROMPT_HEAVY,
        "no_response": micro_batch.NO_RESPONSE,
    }[case.data]
    return micro_batch.make_samples(
        responses,
        temperature=args.rollout_temperature,
        top_p=args.rollout_top_p != 1.0,
        shift_in_rollout=args.use_rollout_logprobs and getattr(args, "fipo_shift_from", "ratio") == "ratio",
    )


def shift_log_probs(args, samples: micro_batch.Samples) -> list[Tensor]:
    """The old log-probs that Future-KL measures from."""
    from_rollout = args.use_rollout_logprobs and getattr(args, "fipo_shift_from", None) != "train"
    return samples.rollout_log_probs if from_rollout else samples.train_log_probs


def denominators(samples: micro_batch.Samples) -> list[Tensor]:
    return [mask.sum().float() for mask in samples.loss_masks]


def train_step(args, samples: micro_batch.Samples, world: World) -> dict:
    """One optimizer step's loss, its gradient by the full logits, and metrics, totalled as Megatron and slime do."""
    leaf = samples.logits.clone().requires_grad_()
    indices = list(range(len(samples.tokens)))[mpu.get_data_parallel_rank() :: world.dp]
    parts = [indices[k :: world.micro_batches] for k in range(world.micro_batches)]
    total, tokens, logs = 0.0, 0.0, []
    for part in parts:
        some, rows = micro_batch.select(samples, part, leaf)
        batch, logits = micro_batch.slime_batch(args, some, rows, denominators(some))
        loss, count, log = slime_loss.loss_function(args, batch, world.micro_batches, len(samples.tokens), logits)
        # Megatron's schedule divides by the number of micro-batches where the loss is a mean over samples.
        loss = loss if args.calculate_per_token_loss else loss / world.micro_batches
        loss.backward()
        total, tokens = total + loss.detach(), tokens + count
        logs.append(log)
    group = mpu.get_data_parallel_group(with_context_parallel=True)
    sums = torch.stack([total.float(), torch.as_tensor(tokens).float()])
    gradient = leaf.grad.clone()
    dist.all_reduce(sums, group=group)
    dist.all_reduce(gradient)  # also over tensor-parallel ranks, which hold different columns
    # Megatron averages over the DP x CP group, or divides by the step's tokens, which each CP rank has counted.
    divisor = sums[1] if args.calculate_per_token_loss else world.dp * world.cp
    metrics = reduce_train_step_metrics(
        logs,
        calculate_per_token_loss=args.calculate_per_token_loss,
        step_global_batch_size=len(samples.tokens),
        cp_size=world.cp,
        dp_with_cp_group=group,
    )
    return {"loss": sums[0] / divisor, "gradient": gradient / divisor, "metrics": metrics}


class multiplied:
    """What FIPO in slime must equal, as the simplest patch of slime: while active, slime's ``policy_loss`` has
    ``weights`` (of whole responses) multiplied onto its per-token loss, and the dual clip c that FIPO asks for."""

    def __init__(self, config, samples: micro_batch.Samples, weights: list[Tensor] | None, world: World) -> None:
        self.config, self.samples, self.weights, self.world = config, samples, weights, world

    def __enter__(self):
        self.original = original = slime_loss.compute_policy_loss
        indices = list(range(len(self.samples.tokens)))[mpu.get_data_parallel_rank() :: self.world.dp]
        calls = iter([indices[k :: self.world.micro_batches] for k in range(self.world.micro_batches)])
        by_size = {}  # a recomputation comes back for the same micro-batch; none here has another's number of tokens

        def compute_policy_loss(ppo_kl, advantages, eps_clip, eps_clip_high, **_):
            loss, clipfrac = original(ppo_kl, advantages, eps_clip, eps_clip_high, eps_clip_c=self.config.dual_clip_c)
            if self.weights is None:
                return loss, clipfrac
            if ppo_kl.numel() not in by_size:
                by_size[ppo_kl.numel()] = next(calls)
            part = by_size[ppo_kl.numel()]
            lengths = [(self.samples.totals[i], self.samples.responses[i]) for i in part]
            local = [cp_utils.slice_log_prob_with_cp(self.weights[i], *n) for i, n in zip(part, lengths, strict=True)]
            return loss * torch.cat(local), clipfrac

        slime_loss.compute_policy_loss = compute_policy_loss

    def __exit__(self, *_):
        slime_loss.compute_policy_loss = self.original


def whole_batch(args, samples: micro_batch.Samples, log_probs: list[Tensor]) -> tuple:
    pack = torch.cat
    old, advantages, masks = shift_log_probs(args, samples), samples.advantages, samples.loss_masks
    return pack(log_probs), pack(old), pack(advantages), pack(masks), samples.responses, fipo_config_from_args(args)


def with_weights_multiplied(args, samples: micro_batch.Samples, world: World) -> dict:
    """slime's own policy loss, with weights that came from whole responses and from plain torch log-probs."""
    weights = fipo_weights(*whole_batch(args, samples, samples.log_probs)).weights.split(samples.responses)
    args.loss_type = "policy_loss"
    with multiplied(fipo_config_from_args(args), samples, weights, world):
        return train_step(args, samples, world)


def objective(args, samples: micro_batch.Samples) -> dict:
    """``fipo_policy_loss`` under slime's reducer: nothing else of slime in it, nor of the plugin."""
    leaf = samples.logits.clone().requires_grad_()
    if hasattr(ppo_utils, "compute_log_probs"):  # v0.3.0: Megatron's fused cross entropy, whose gradient is bfloat16
        batch, logits = micro_batch.slime_batch(args, samples, leaf, [])
        _, found = slime_loss.get_log_probs_and_entropy(
            logits, args=args, **{key: batch[key] for key in ("unconcat_tokens", "total_lengths", "response_lengths")}
        )
        log_probs = found["log_probs"]
    else:
        log_probs = micro_batch.reference_log_probs(samples, leaf, args.rollout_temperature)
    per_token, weights = fipo_policy_loss(
        *whole_batch(args, samples, log_probs), eps_clip=args.eps_clip, eps_clip_high=args.eps_clip_high
    )
    reducer = cp_utils.get_sum_of_sample_mean(
        samples.totals, samples.responses, samples.loss_masks, denominators(samples), args.calculate_per_token_loss
    )
    # Megatron divides by the tokens after the backward pass, slime by the samples before it.
    tokens = sum(mask.sum().clamp_min(1) for mask in samples.loss_masks)
    before, after = (1, tokens) if args.calculate_per_token_loss else (len(samples.tokens), 1)
    loss = reducer(per_token) / before
    loss.backward()
    names = METRICS if getattr(args, "fipo_log_detail", None) else fipo_loss.DEFAULT_METRICS
    metrics = {f"fipo/{name}": float(reducer(weights.metrics[name]) / before / after) for name in names}
    return {
        "loss": loss.detach() / after,
        "gradient": leaf.grad / after,
        "metrics": metrics,
        "keep": weights.keep,
    }


def run_cases(version: str, name: str, world: World) -> dict:
    results: dict = {}
    for case_name, case in CASES.items():
        if version not in case.versions or (case.allgather and name not in ("cp1", "cp2")):
            continue
        # On one rank there is nothing to gather: that run is what the others must equal.
        plain = dict(allgather_cp=False) if case.allgather and name == "cp1" else {}
        samples = samples_of(case)
        if world.dp * world.micro_batches > len(samples.tokens):
            continue
        result = {"fipo": train_step(case.namespace(**plain), samples, world)}
        result["multiplied"] = with_weights_multiplied(case.namespace(**plain), samples, world)
        if name == "cp1" and case.objective:
            result["objective"] = objective(case.namespace(), samples)
        results[case_name] = result
    return results


def run_unit_cases(world: World) -> dict:
    results = {}
    for name, case in UNIT_CASES.items():
        samples, args = samples_of(case), case.namespace(loss_type="policy_loss")
        with multiplied(fipo_config_from_args(args), samples, None, world):
            expected = train_step(args, samples, world)
        results[name] = {"fipo": train_step(case.namespace(), samples, world), "policy_loss": expected}
    return results


class Collectives(TorchDispatchMode):
    """Records (operation, elements sent) of every collective that torch.distributed starts on this rank."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            sent = args[1] if func._schema.name.endswith("allgather_base_") else args[0]
            sent = sent if isinstance(sent, Tensor) else sent[0]
            self.calls.append((func._schema.name, sent.numel()))
        return func(*args, **(kwargs or {}))


def forward_collectives(case: Case, world: World, **overrides) -> list[tuple[str, int]]:
    args, samples = case.namespace(**overrides), samples_of(case)
    batch, logits = micro_batch.slime_batch(args, samples, samples.logits, denominators(samples))
    with Collectives() as collectives:
        slime_loss.loss_function(args, batch, 1, len(samples.tokens), logits.requires_grad_())
    return collectives.calls


def run_collectives(world: World) -> dict:
    return {
        name: {
            "samples": len(samples_of(CASES[name]).tokens),
            "fipo": forward_collectives(CASES[name], world),
            "policy_loss": forward_collectives(CASES[name], world, loss_type="policy_loss"),
        }
        for name in ("defaults", "trained_tokens", "prompt_heavy", "no_response", "opsm", "recompute")
    }


def run_errors() -> dict[str, str]:
    """What the loss says at the first batch, without the launcher's checks before it."""
    size = dict(rollout_batch_size=8, n_samples_per_prompt=4, global_batch_size=32)
    settings = {
        "no_rollout_log_probs": dict(use_rollout_logprobs=True),
        "no_log_probs": {},
        "shift_from_train": dict(use_rollout_logprobs=True, fipo_shift_from="train"),
        "single_step": size,
        "gspo": dict(advantage_estimator="gspo"),
        "cispo": dict(advantage_estimator="cispo"),
        "no_advantages": dict(compute_advantages_and_returns=False),
        "eps_clip_c": dict(eps_clip_c=3.0),
        "eps_clip_high": dict(eps_clip_high=4.0, fipo_dual_clip_c=2.0),
        "decay_rate": dict(fipo_decay_rate=0),
        "misspelt": dict(fipo_decayrate=16.0),
        "list": dict(fipo_decay_rate=[32]),
    }
    absent = {"no_rollout_log_probs": "rollout_log_probs", "no_log_probs": "log_probs"}
    errors, samples = {}, samples_of(Case())
    for name, overrides in settings.items():
        args = Case().namespace(**overrides)
        batch, logits = micro_batch.slime_batch(args, samples, samples.logits, denominators(samples))
        if name in absent:
            batch[absent[name]] = None
        try:
            slime_loss.loss_function(args, batch, 1, len(samples.tokens), logits)
        except ValueError as error:
            errors[name] = str(error)
    # Two steps per rollout, or one that is asked for, pass.
    for allowed in (
        dict(size, global_batch_size=16),
        dict(size, fipo_allow_single_step=True, use_rollout_logprobs=True),
    ):
        args = Case().namespace(**allowed)
        batch, logits = micro_batch.slime_batch(args, samples, samples.logits, denominators(samples))
        slime_loss.loss_function(args, batch, 1, len(samples.tokens), logits)
    return errors


def run_refused() -> dict[str, str]:
    """What importing the plugin says where slime's loss path lacks a name, or wraps its policy loss."""
    refused = {}
    for module, name in ((slime_loss, "compute_policy_loss"), (cp_utils, "slice_log_prob_with_cp")):
        original = getattr(module, name)
        delattr(module, name)
        try:
            fipo_loss.check_slime()
        except ImportError as error:
            refused[name] = str(error)
        setattr(module, name, original)
    original = slime_loss.policy_loss_function
    slime_loss.policy_loss_function = lambda *args: original(*args)
    try:
        fipo_loss.check_slime()
    except ImportError as error:
        refused["a call of compute_policy_loss"] = str(error)
    slime_loss.policy_loss_function = original
    fipo_loss.check_slime()
    return refused


def run_mismatch(world: World) -> dict:
    """Metrics of a rollout's first and second step, with the hook that slime calls before each."""

    def step(rollout_step: int, **overrides) -> tuple[dict, Namespace]:
        args = Case().namespace(fipo_chained_hook_path="tests.slime.hooks.record_step", **overrides)
        fipo_loss.before_train_step_hook(args, 3, rollout_step, "model", optimizer="optimizer", opt_param_scheduler=1)
        samples = samples_of(Case(overrides))
        return train_step(args, samples, world)["metrics"], args

    from_rollout = dict(use_rollout_logprobs=True)
    first, args = step(0, **from_rollout)
    samples = samples_of(Case(from_rollout))
    future_kl = fipo_weights(*whole_batch(args, samples, samples.log_probs)).future_kl.abs()
    reducer = cp_utils.get_sum_of_sample_mean(
        samples.totals, samples.responses, samples.loss_masks, denominators(samples)
    )
    return {
        "user_hook": list(args.recorded_step[:2]),
        "first": first,
        "second": step(1, **from_rollout)[0],
        "trainer_log_probs": step(0)[0],
        "shift_from_train": step(0, **CASES["shift_from_train"].args)[0],
        "expected_future_kl_abs": float(reducer(future_kl) / len(samples.tokens)),
    }


def called_with(function: Callable, arguments: str) -> Callable:
    """slime's ``policy_loss_function`` as a later release could have it: other arguments of ``compute_policy_loss``."""
    tree = ast.parse(inspect.getsource(function))
    [call] = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "compute_policy_loss"
    ]
    wanted = ast.parse(f"f({arguments})", mode="eval").body
    call.args, call.keywords = wanted.args, wanted.keywords
    names = {}
    exec(compile(ast.fix_missing_locations(tree), slime_loss.__file__, "exec"), slime_loss.__dict__, names)
    return names["policy_loss_function"]


def run_forwarding(world: World) -> dict:
    """Unit weights against slime's own loss where slime's call has one argument more, which halves the loss."""
    original = slime_loss.policy_loss_function, slime_loss.compute_policy_loss
    case = UNIT_CASES["defaults"]
    samples, dual_clip_c = samples_of(case), fipo_config_from_args(case.namespace()).dual_clip_c

    def scaled(ppo_kl, advantages, eps_clip, eps_clip_high, eps_clip_c=None, token_scale=1.0):
        loss, clipfrac = original[1](ppo_kl, advantages, eps_clip, eps_clip_high, eps_clip_c=eps_clip_c)
        return loss * token_scale, clipfrac

    def scaled_with_dual_clip(ppo_kl, advantages, eps_clip, eps_clip_high, eps_clip_c=None, token_scale=1.0):
        return scaled(ppo_kl, advantages, eps_clip, eps_clip_high, dual_clip_c, token_scale)

    clips = "ppo_kl, advantages, args.eps_clip, args.eps_clip_high"
    results = {}
    for arguments in (
        f"{clips}, token_scale=0.5",
        f"{clips}, eps_clip_c=None, token_scale=0.5",
        f"{clips}, None, 0.5",
        f"{clips}, None, token_scale=0.5",
        "token_scale=0.5, eps_clip=args.eps_clip, eps_clip_high=args.eps_clip_high, "
        "ppo_kl=ppo_kl, advantages=advantages",
    ):
        slime_loss.policy_loss_function = called_with(original[0], arguments)
        slime_loss.compute_policy_loss = scaled_with_dual_clip
        expected = train_step(case.namespace(loss_type="policy_loss"), samples, world)
        slime_loss.compute_policy_loss = scaled
        results[arguments] = {"fipo": train_step(case.namespace(), samples, world), "policy_loss": expected}
    slime_loss.policy_loss_function, slime_loss.compute_policy_loss = original
    return results


def run_noise(world: World) -> list[dict]:
    """Per rank what is logged over rollouts, and the metric of each one's first step."""
    fipo_loss.engine_noise = engine_noise.EngineNoise()
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda entry: messages.append(entry.getMessage())
    engine_noise.logger.addHandler(handler)
    engine_noise.logger.propagate = False
    from_rollout = dict(use_rollout_logprobs=True, vocab_size=30, padded_vocab_size=32)
    rollouts = []
    for overrides in (
        dict(fipo_clip_ratio_low=0.99, fipo_clip_ratio_high=1e3),  # few weights are clipped
        dict(fipo_clip_ratio=0.9),
        dict(fipo_clip_ratio=0.9),
        dict(),
        dict(use_rollout_logprobs=False),
    ):
        case = Case(from_rollout | overrides)
        args = case.namespace()
        fipo_loss.before_train_step_hook(args, len(rollouts), 0)
        metrics = train_step(args, samples_of(case), world)["metrics"]
        fipo_loss.before_train_step_hook(args, len(rollouts), 1)
        train_step(args, samples_of(case), world)
        rollouts.append({"share": metrics.get("fipo/mismatch_clip_frac"), "messages": list(messages)})
        messages.clear()
    gathered = [None] * world.size
    dist.all_gather_object(gathered, rollouts)
    return gathered


def run_memory() -> dict[str, float]:
    """Most floats per token that the forward pass holds beyond ``policy_loss``'s, at a vocabulary so small that its
    logits hide nothing."""
    lengths = [1024] * 8
    responses = tuple((4, n, (-1.0) ** i, {5: 4.0}, ()) for i, n in enumerate(lengths))
    samples = micro_batch.make_samples(responses)
    extra = {}
    for name, overrides in (("defaults", {}), ("everything", dict(fipo_log_detail=True, fipo_preset="7b"))):
        peaks = []
        for loss_type in ("custom_loss", "policy_loss"):
            args = Case().namespace(loss_type=loss_type, **overrides)
            batch, logits = micro_batch.slime_batch(args, samples, samples.logits, denominators(samples))
            logits = logits[..., :2].clone().requires_grad_()
            batch["unconcat_tokens"] = [tokens % 2 for tokens in batch["unconcat_tokens"]]
            forward = partial(slime_loss.loss_function, args, batch, 1, len(lengths), logits)
            peaks.append(peak_extra_bytes(lambda call=forward: call() and None))
        extra[name] = (peaks[0] - peaks[1]) / 4 / sum(lengths)
    return extra


def run_rank(version: str, name: str) -> dict:
    world = WORLDS[name]
    results = {}
    if name != "compiled":
        torch.compiler.set_stance("force_eager")  # compiling in every rank would take longer than everything else
        results["cases"] = run_cases(version, name, world)
        results["noise"] = run_noise(world)
    if name in ("cp1", "compiled"):
        results["unit"] = run_unit_cases(world)
    if name == "cp1":
        results["errors"] = run_errors()
        results["refused"] = run_refused()
        results["forwarding"] = run_forwarding(world)
        results["mismatch"] = run_mismatch(world)
        results["extra_floats_per_token"] = run_memory()
    if world.cp > 1:
        results["collectives"] = [None] * world.size
        dist.all_gather_object(results["collectives"], run_collectives(world))
    dist.barrier()
    return results


def run_world(world: World, out: Path, name: str, run: Callable[[], dict]) -> bool:
    """Call ``run`` on the ranks of ``world``, forked here; rank 0 writes what it returns to ``out/name.pt``."""
    children = []
    for rank in range(world.size):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                torch.set_num_threads(1)
                store = f"file://{out / name}.store"
                dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world.size)
                mpu.initialize_model_parallel(tensor_model_parallel_size=world.tp, context_parallel_size=world.cp)
                results = run()
                if rank == 0:
                    torch.save(results, out / f"{name}.pt")
                status = 0
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
            os._exit(status)
        children.append(pid)
    return all(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0 for pid in children)


def main() -> None:
    version, out, *names = sys.argv[1:]
    failed = [name for name in names if not run_world(WORLDS[name], Path(out), name, partial(run_rank, version, name))]
    if failed:
        sys.exit(f"ranks failed in {', '.join(failed)}")


if __name__ == "__main__":
    main()
