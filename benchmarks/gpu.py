"""`make bench-gpu`: what FIPO costs on a CUDA device, as ratios of things measured in this one run.

Prints one table of Future-KL and of the whole weights, and one of FIPO's share of slime's real loss function where
slime is on the path (PYTHONPATH=slime:Megatron-LM). A bound that is missed makes the command exit with 1, no CUDA
device with 2.
"""

import math
import os
import statistics
import sys
import tempfile
import time

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.listing import paper_listing
from slime_fipo import FipoConfig, fipo_weights, future_kl
from slime_fipo.algorithm import kernel_check

DECAY_RATE = 32.0
# What slime logs without --fipo-log-detail.
METRICS = ("future_kl", "influence_weight", "influence_deviation", "clip_high_frac", "clip_low_frac", "dropped_frac")
FUTURE_KL_FLOOR = 8  # bytes per token: read the shift, write Future-KL
WEIGHTS_FLOOR = 16 + 4 + 4 * len(METRICS)  # read three floats and an int32 mask, write weights and metrics
VOCABULARY = 151_936
SLIME_TOKENS = (8_192, 32_768)


def shapes() -> dict[str, list[int]]:
    rng = np.random.default_rng(0)
    ragged = []
    while sum(ragged) < 2**20:
        ragged.append(int(np.exp(rng.uniform(math.log(100), math.log(20480)))))
    ragged[-1] -= sum(ragged) - 2**20
    return {
        "64×20480": [20480] * 64,
        "512×2048": [2048] * 512,
        f"ragged, {len(ragged)} of 100-20480": ragged,
        "1×131072": [131072],
    }


def copy_bandwidth(device) -> float:
    """Bytes per second that a copy of 1 GiB reads and writes."""
    source = torch.empty(2**28, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / device_seconds([lambda: target.copy_(source)])


def device_seconds(calls, repeats=30) -> float:
    """Median seconds of device time of one call, ``calls`` taking turns on different copies of their input.

    The copies keep the device's cache cold, as a training step leaves it. The device is made to wait until the host has
    queued a whole round, so that launch gaps of a busy host do not count: a training step's host runs ahead as well.
    """
    for call in calls[:1] * 3:
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    calls[0]()
    queueing = time.perf_counter() - start
    torch.cuda.synchronize()
    slow = time.perf_counter() - start > 0.1
    taken = []
    for i in range(3 if slow else repeats):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if not slow:
            torch.cuda._sleep(int(2e9 * (3 * queueing + 1e-4)))  # cycles, at about 2 GHz
        first.record()
        calls[i % len(calls)]()
        last.record()
        torch.cuda.synchronize()
        taken.append(first.elapsed_time(last) / 1e3)
    return statistics.median(taken)


def host_seconds(call, repeats=30) -> float:
    """Median seconds until ``call`` returns, the device not waited for."""
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
        torch.cuda.synchronize()
    return statistics.median(taken)


def make_batch(lengths, device, seed):
    tokens = sum(lengths)
    generator = torch.Generator(device).manual_seed(seed)
    old = -torch.rand(tokens, generator=generator, device=device)
    shift = 0.05 * torch.randn(tokens, generator=generator, device=device)
    advantages = torch.randn(tokens, generator=generator, device=device)
    return old + shift, old, advantages, torch.ones(tokens, dtype=torch.int32, device=device)


def functional_recurrence(x, distance, log2_decay):
    """Future-KL by odd-even reduction over the whole batch, in operations that torch.compile takes."""
    n = x.shape[0]
    if n == 1:
        return x
    pairs = n // 2
    decay = torch.exp2(distance * log2_decay)
    merged_x = x[: 2 * pairs : 2] + decay[: 2 * pairs : 2] * x[1::2]
    merged_distance = distance[: 2 * pairs : 2] + distance[1::2]
    if n % 2:
        merged_x, merged_distance = torch.cat([merged_x, x[-1:]]), torch.cat([merged_distance, distance[-1:]])
    at_left = functional_recurrence(merged_x, merged_distance, log2_decay)
    behind = torch.cat([at_left[1:], x.new_zeros(1)])[:pairs]  # the last token's decay is 0
    result = torch.stack([at_left[:pairs], x[1::2] + decay[1::2] * behind], dim=1).flatten()
    return torch.cat([result, at_left[-1:]]) if n % 2 else result


def future_kl_calls(lengths, batches) -> dict:
    """Name -> one call per batch, each of the batch's Future-KL."""
    from benchmarks.serial_scan import serial_future_kl

    device = batches[0][0].device
    longest, decay = max(lengths), -1.0 / DECAY_RATE
    offsets = torch.tensor([0, *np.cumsum(lengths)], device=device)
    ends = offsets[1:] - 1
    shifts = [log_probs - old for log_probs, old, _, _ in batches]
    compiled_scan = torch.compile(functional_recurrence, dynamic=False)

    def padded(shift):
        return torch.nn.utils.rnn.pad_sequence(shift.split(lengths), batch_first=True)

    def scan_compiled(shift):
        distance = torch.ones_like(shift).index_fill_(0, ends, math.inf)
        return compiled_scan(shift, distance, decay)

    ways = {
        "paper's listing, padded": lambda shift: paper_listing(shift, DECAY_RATE),
        "serial scan, a thread per response": lambda shift: serial_future_kl(shift, offsets, longest, DECAY_RATE),
        "scan": lambda shift: future_kl(shift, lengths, DECAY_RATE, impl="scan"),
        "scan, compiled": scan_compiled,
        "kernel": lambda shift: future_kl(shift, lengths, DECAY_RATE, impl="triton"),
    }
    inputs = {"paper's listing, padded": [padded(shifts[0])]}
    return {name: [(lambda x=x, way=way: way(x)) for x in inputs.get(name, shifts)] for name, way in ways.items()}


def weights_calls(lengths, batches) -> dict:
    """Name -> one call per batch, each of the batch's weights and the metrics that slime logs."""

    def call(impl, batch):
        return lambda: fipo_weights(*batch, lengths, FipoConfig(decay_rate=DECAY_RATE, impl=impl), metrics=METRICS)

    return {name: [call(impl, batch) for batch in batches] for name, impl in (("scan", "scan"), ("kernel", "triton"))}


def measure_shape(table, shape, lengths, bandwidth, device) -> list[str]:
    """Add the rows of one shape; returns the bounds that it misses."""
    tokens = sum(lengths)
    batches = [make_batch(lengths, device, seed) for seed in range(max(2, math.ceil(2**28 / (16 * tokens))))]
    missed = []
    for what, calls, floor in (
        ("Future-KL", future_kl_calls(lengths, batches), FUTURE_KL_FLOOR * tokens / bandwidth),
        ("weights", weights_calls(lengths, batches), WEIGHTS_FLOOR * tokens / bandwidth),
    ):
        seconds, host = {}, {}
        for name, some in calls.items():
            try:
                seconds[name], host[name] = device_seconds(some), host_seconds(some[0], 10)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
        reference = calls["scan"][0]()
        result = calls["kernel"][0]()
        reference, result = (getattr(r, "weights", r) for r in (reference, result))
        if not torch.allclose(reference, result, rtol=1e-4, atol=1e-4):
            missed.append(f"{shape}: the kernel's {what} is not the scan's")
        kernel = seconds["kernel"]
        for name in calls:
            if name in seconds:
                row = (f"{seconds[name] * 1e3:.3f}", f"{seconds[name] / kernel:.2f}", f"{seconds[name] / floor:.1f}")
                table.add_row(shape, what, name, *row, f"{host[name] * 1e3:.2f}")
            else:
                table.add_row(shape, what, name, "out of memory", "", "", "")
        table.add_row(shape, what, "memory floor", f"{floor * 1e3:.3f}", f"{floor / kernel:.2f}", "1.0", "")
        table.add_section()
        if shape == "64×20480":
            bounds = {"memory floor": (kernel / floor, "<=", 3)}
            for name, factor in (("paper's listing, padded", 100), ("serial scan, a thread per response", 10)):
                if name in seconds:
                    bounds[name] = (seconds[name] / kernel, ">=", factor)
            for name, (value, sign, bound) in bounds.items():
                if not (value <= bound if sign == "<=" else value >= bound):
                    missed.append(f"{shape}, {what}: {value:.1f}× against {name}, must be {sign} {bound}×")
    return missed


def measure_synchronisation(device) -> list[str]:
    """Sync-debug mode raises where a call waits for the device, once the kernel is compiled and checked."""
    lengths = [2048, 1, 0, 3000]
    batch = make_batch(lengths, device, 0)

    def call(impl):
        for decay_over in ("positions", "trained_tokens"):
            fipo_weights(*batch, lengths, FipoConfig(decay_over=decay_over, impl=impl), metrics=METRICS)

    call("triton")
    torch.cuda.set_sync_debug_mode("error")
    try:
        call("triton")
        call("scan")
    except RuntimeError as error:
        return [f"a call waits for the device: {error}"]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return []


def slime_batch(tokens, vocabulary, device) -> tuple[dict, torch.Tensor]:
    """A micro-batch of ``tokens`` tokens in responses of 4,000, and the logits [1, T, V] that slime's loss gets."""
    total = 4096
    samples, prompt = tokens // total, 96
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(1, tokens, vocabulary, generator=generator, device=device).requires_grad_()
    ids = torch.randint(vocabulary, (samples, total), generator=generator, device=device)
    old = torch.empty(samples, total - prompt, device=device).fill_(-math.log(vocabulary) - 0.5)
    old += 0.05 * torch.randn(old.shape, generator=generator, device=device)
    masks = torch.ones(samples, total - prompt, dtype=torch.int32, device=device)
    batch = {
        "unconcat_tokens": list(ids),
        "total_lengths": [total] * samples,
        "response_lengths": [total - prompt] * samples,
        "loss_masks": list(masks),
        "advantages": [torch.full_like(row, (-1.0) ** i) for i, row in enumerate(old)],
        "log_probs": list(old),
        "rollout_log_probs": list(old),
        "rollout_mask_sums": [mask.sum().float() for mask in masks],
        "rollout_top_p_token_ids": None,
        "rollout_top_p_token_offsets": None,
    }
    batch["group_mask_sums"] = batch["rollout_mask_sums"]  # v0.3.0's name
    return batch, logits


def measure_slime(table, tokens, vocabulary, device) -> list[str]:
    """Forward and backward of slime's ``loss_function`` with FIPO and with its own policy loss."""
    from slime.backends.megatron_utils.loss import loss_function

    from tests.slime.cases import Case

    batch, logits = slime_batch(tokens, vocabulary, device)
    samples = len(batch["total_lengths"])

    def step(loss_type):
        logits.grad = None
        loss, _, _ = loss_function(Case().namespace(loss_type=loss_type), batch, 1, samples, logits)
        loss.backward()

    seconds, peak = {}, {}
    for loss_type in ("policy_loss", "custom_loss"):
        step(loss_type)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step(loss_type)
        peak[loss_type] = torch.cuda.max_memory_allocated()
    rounds = [{name: device_seconds([lambda name=name: step(name)], 5) for name in peak} for _ in range(3)]
    seconds = {name: statistics.median(r[name] for r in rounds) for name in peak}
    packed = [torch.cat(batch[key]) for key in ("log_probs", "advantages", "loss_masks")]
    lengths = batch["response_lengths"]
    alone = device_seconds(
        [lambda: fipo_weights(packed[0], packed[0] + 0.1, *packed[1:], lengths, FipoConfig(), metrics=METRICS)]
    )
    share = alone / seconds["custom_loss"]
    difference = (seconds["custom_loss"] - seconds["policy_loss"]) / seconds["custom_loss"]
    table.add_row(
        f"{tokens:,}",
        *(f"{seconds[name] * 1e3:.1f}" for name in peak),
        f"{alone * 1e3:.3f} ({share:.2%})",
        f"{difference:+.2%}",
        *(f"{peak[name] / 2**30:.2f}" for name in peak),
    )
    return [] if share <= 0.01 else [f"FIPO's weights take {share:.2%} of slime's loss step at {tokens:,} tokens"]


def slime_table(console, device, vocabulary=VOCABULARY, sizes=SLIME_TOKENS) -> list[str]:
    """Print FIPO's share of slime's loss step, or why it cannot be measured; returns the bounds that are missed."""
    try:
        import slime.backends.megatron_utils.loss  # noqa: F401
        from megatron.core import mpu
    except ImportError as error:
        console.print(f"FIPO's share of slime's loss: not measured, {error}. Run with PYTHONPATH=slime:Megatron-LM.")
        return []
    table = Table(title=f"slime's loss_function, forward and backward, vocabulary {vocabulary:,}, float32 logits")
    columns = (
        "tokens",
        "policy_loss ms",
        "with FIPO ms",
        "FIPO's weights alone ms",
        "difference",
        "peak GiB",
        "with FIPO GiB",
    )
    for column in columns:
        table.add_column(column)
    missed = []
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    with tempfile.TemporaryDirectory() as directory:
        backend = "nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, init_method=f"file://{directory}/store", rank=0, world_size=1)
        mpu.initialize_model_parallel()
        for tokens in sizes:
            try:
                missed += measure_slime(table, tokens, vocabulary, device)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                table.add_row(f"{tokens:,}", "out of memory")
        torch.distributed.destroy_process_group()
    console.print(table)
    return missed


def main() -> int:
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to measure (make bench measures on a CPU)", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    future_kl(torch.ones(2000, device=device), [2000], DECAY_RATE, impl="triton")
    if kernel_check.refused_devices or kernel_check.load_kernel().INTERPRETED:
        print("no compiled kernel: see the warning above, and unset TRITON_INTERPRET", file=sys.stderr)
        return 2
    console = Console(width=max(120, Console().width))
    bandwidth = copy_bandwidth(device)
    name = torch.cuda.get_device_name(device)
    table = Table(
        title=f"{name}, torch {torch.__version__}, copies at {bandwidth / 1e12:.2f} TB/s, float32, τ = {DECAY_RATE:g}"
    )
    for column in ("responses", "what", "how", "device ms", "× kernel", "× floor", "host ms"):
        table.add_column(column)
    missed = []
    for shape, lengths in shapes().items():
        missed += measure_shape(table, shape, lengths, bandwidth, device)
    console.print(table)
    missed += measure_synchronisation(device)
    missed += [f"the scan took the kernel's place on {refused}" for refused in kernel_check.refused_devices]
    missed += slime_table(console, device)
    for what in missed:
        print(f"missed: {what}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
