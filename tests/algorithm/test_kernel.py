"""The Triton kernel, interpreted on a CPU or compiled on a GPU: against golden numbers, float64 and the scan.

Blocks are made small, so that short batches have many of them and so that the interpreter, which takes a millisecond
per operation, gets through.
"""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from slime_fipo import FipoConfig, fipo_policy_loss, fipo_weights, future_kl
from slime_fipo.algorithm import ContextParallel, kernel_check
from slime_fipo.algorithm.config import DECAY_OVER
from slime_fipo.algorithm.weights import METRICS

from . import oracle
from .test_context_parallel import rank_slices, zigzag_chunk_lengths
from .test_future_kl import DECAY_RATES, make_shift, worst_error
from .test_golden import CASES, GoldenCase, close
from .test_weights import make_batch

triton = pytest.importorskip("triton")

from slime_fipo.algorithm import kernel  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = Path(__file__).parents[2]
needs_kernel = pytest.mark.skipif(
    DEVICE == "cpu" and not kernel.INTERPRETED,
    reason="Triton was imported without TRITON_INTERPRET=1, and there is no GPU",
)
pytestmark = needs_kernel
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    use_blocks(monkeypatch, 32)
    yield
    assert not kernel_check.refused_devices, "the scan took the kernel's place"


def use_blocks(monkeypatch, block, tile=4):
    monkeypatch.setattr(kernel, "BLOCK", block)
    monkeypatch.setattr(kernel, "TILE", tile)


def on_device(batch):
    return [x.to(DEVICE) for x in batch]


def assert_same_as_scan(batch, lengths, config, metrics=METRICS):
    """Every output of the kernel beside the scan's; values computed from F may differ by its rounding."""
    batch = on_device(batch)
    fields = config.as_dict()
    ours = fipo_weights(*batch, lengths, FipoConfig(**fields | {"impl": "triton"}), metrics=metrics)
    scan = fipo_weights(*batch, lengths, FipoConfig(**fields | {"impl": "scan"}), metrics=metrics)
    scale = max(1.0, scan.future_kl.abs().max().item() if scan.future_kl.numel() else 0.0)
    torch.testing.assert_close(ours.future_kl, scan.future_kl, rtol=0, atol=5e-6 * scale)
    torch.testing.assert_close(ours.weights, scan.weights, rtol=2e-5, atol=1e-6)
    assert ours.keep.dtype == torch.bool and torch.equal(ours.keep, scan.keep)
    assert tuple(ours.metrics) == tuple(scan.metrics) == tuple(metrics)
    rounded = {"future_kl": 5e-6 * scale, "influence_weight": 1e-5, "influence_deviation": 1e-5}
    for name, values in ours.metrics.items():
        assert values.dtype == torch.float32 and not values.requires_grad
        if name in rounded:
            torch.testing.assert_close(values, scan.metrics[name], rtol=2e-5, atol=rounded[name], msg=name)
        else:
            assert torch.equal(values, scan.metrics[name]), name
    return ours


@pytest.mark.parametrize("name", CASES)
def test_recorded_numbers(name, monkeypatch):
    use_blocks(monkeypatch, 128)
    case = GoldenCase(name)
    mask, final_mask = case.packed("mask").bool(), case.packed("final_mask").bool()
    log_probs, old, advantages, loss_mask = on_device(
        case.packed(key, torch.float32) for key in ("log_probs", "old_log_probs", "advantages", "mask")
    )
    log_probs.requires_grad_()
    config = FipoConfig(**case.config, impl="triton")
    loss, result = fipo_policy_loss(log_probs, old, advantages, loss_mask, case.lengths, config)
    close(result.future_kl.cpu(), case.packed("future_kl"), mask)
    close(result.weights.cpu(), case.packed("influence_weights"), final_mask)
    close(loss.detach().cpu(), case.packed("pg_losses"), final_mask)
    ((loss * final_mask.to(DEVICE)).sum() / final_mask.sum()).backward()
    gradient = case.packed("grad_log_probs")
    assert (log_probs.grad.cpu().double() - gradient).abs().max() <= 2e-5 * gradient.abs().max()

    rows = torch.from_numpy(case.arrays["mask"]), torch.from_numpy(case.arrays["final_mask"])
    assert result.keep.tolist() == (~((rows[0].sum(1) > 0) & (rows[1].sum(1) == 0))).tolist()
    recorded = {
        "influence_weight": "influence_weights_mean",
        "clip_high_frac": "clip_frac_upper",
        "clip_low_frac": "clip_frac_lower",
        "neg_ratio_2_3": "neg_ratio_2_3",
        "neg_ratio_3_4": "neg_ratio_3_4",
        "neg_ratio_4_c": "neg_ratio_4_10",
    }
    for ours, theirs in recorded.items():
        mean = result.metrics[ours].cpu()[mask].double().mean().item()
        assert mean == pytest.approx(case.metric(theirs), abs=1e-6), ours


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    lengths=st.lists(st.one_of(st.sampled_from([0, 1, 15, 16, 17, 31, 32, 33]), st.integers(0, 100)), max_size=5),
    decay_rate=st.one_of(st.sampled_from(DECAY_RATES), st.floats(0.5, 4096)),
    spikes=st.integers(0, 5),
    hole_share=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    trained_only=st.booleans(),
    block=st.sampled_from([16, 32, 64]),
    tile=st.sampled_from([1, 2, 8]),
)
def test_future_kl_agrees_with_the_recurrence(seed, lengths, decay_rate, spikes, hole_share, trained_only, block, tile):
    shift, mask = make_shift(seed, lengths, spikes, hole_share)
    expected = oracle.future_kl(shift, lengths, decay_rate, mask if trained_only else None)
    decay_mask = torch.from_numpy(mask).to(DEVICE) if trained_only else None
    with pytest.MonkeyPatch.context() as patch:
        use_blocks(patch, block, tile)
        shift = torch.from_numpy(shift).to(DEVICE)
        result = future_kl(shift, lengths, decay_rate, decay_mask=decay_mask, impl="triton")
    assert result.dtype == torch.float32 and result.shape == (sum(lengths),)
    assert worst_error(result.cpu(), expected) <= 1e-5


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    lengths=st.lists(st.integers(0, 80), max_size=5),
    spikes=st.integers(0, 8),
    hole_share=st.sampled_from([0.0, 0.4, 1.0]),
    config=st.builds(
        FipoConfig,
        decay_rate=st.sampled_from([0.5, 8.0, 32.0, 4096.0]),
        clip_ratio_low=st.sampled_from([0.0, 0.2, 0.9]),
        clip_ratio_high=st.sampled_from([0.0, 0.2, 3.0]),
        clip_high_only=st.booleans(),
        clip_influence=st.booleans(),
        safety_thresh=st.sampled_from([None, 1.1, 3.0, 10.0]),
        dual_clip_c=st.sampled_from([None, 1.5, 3.0, 10.0]),
        max_dual_clipped_tokens=st.sampled_from([None, 0, 1, 3]),
        decay_over=st.sampled_from(DECAY_OVER),
        impl=st.just("triton"),
    ),
)
def test_weights_agree_with_the_oracle(seed, lengths, spikes, hole_share, config):
    batch = make_batch(seed, lengths, spikes=spikes, hole_share=hole_share)
    with pytest.MonkeyPatch.context() as patch:
        use_blocks(patch, 64)
        result = fipo_weights(*on_device(batch), lengths, config, metrics=())
    weights, future, keep = oracle.weights(*(x.numpy() for x in batch), lengths, config)
    assert np.abs(result.future_kl.cpu().numpy() - future).max(initial=0) <= 1e-5 * max(
        1, np.abs(future).max(initial=0)
    )
    np.testing.assert_allclose(result.weights.cpu().numpy(), weights, rtol=2e-5, atol=1e-5)
    assert result.keep.tolist() == keep.tolist()


@pytest.mark.parametrize("decay_over", DECAY_OVER)
@pytest.mark.parametrize(
    "lengths",
    [
        [31, 32, 33, 1, 63, 64, 65, 0],  # at every place of a block's edge
        [0, 0, 32, 0, 32, 0, 0],  # whole blocks, and nothing between them
        [33],  # longer than a block by one token
        [1],
        [0, 160, 0],  # more later blocks than are summed in one step
    ],
    ids=str,
)
def test_block_edges(lengths, decay_over):
    batch = make_batch(0, lengths, spikes=9, hole_share=0.3)
    for decay_rate in (0.5, 1000.0):
        config = FipoConfig(decay_rate=decay_rate, decay_over=decay_over, max_dual_clipped_tokens=0, safety_thresh=3.0)
        assert_same_as_scan(batch, lengths, config)


def test_a_thousand_responses_of_one_token(monkeypatch):
    use_blocks(monkeypatch, 512)
    batch = make_batch(1, [1] * 1000, spikes=60, hole_share=0.1)
    result = assert_same_as_scan(batch, [1] * 1000, FipoConfig(max_dual_clipped_tokens=0))
    assert 0 < (~result.keep).sum() < 60


def test_the_block_size_in_use(monkeypatch):
    monkeypatch.undo()
    assert kernel.BLOCK == 1024
    for lengths in ([1025], [1000, 24, 1]):
        assert_same_as_scan(make_batch(2, lengths, spikes=5, hole_share=0.2), lengths, FipoConfig(decay_rate=300.0))


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]], ids=str)
def test_no_tokens(lengths):
    empty = torch.empty(0, device=DEVICE)
    result = fipo_weights(empty, empty, empty, empty, lengths, FipoConfig(impl="triton"))
    assert result.weights.shape == result.future_kl.shape == (0,) and result.keep.tolist() == [True] * len(lengths)
    assert set(result.metrics) == set(METRICS) and all(value.shape == (0,) for value in result.metrics.values())
    assert future_kl(empty, lengths, 32.0, impl="triton").shape == (0,)


def test_a_dropped_response_is_dropped_in_all_its_blocks():
    """The tokens that decide stand in its first and its last block; its neighbours share those blocks and stay."""
    lengths = [10, 100, 10]
    log_probs = torch.full((120,), -1.0)
    old, advantages, mask = log_probs.clone(), -torch.ones(120), torch.ones(120)
    log_probs[[12, 107]] += 5.0
    batch = (log_probs, old, advantages, mask)
    result = assert_same_as_scan(batch, lengths, FipoConfig())
    assert result.keep.tolist() == [True, False, True] and (result.weights[10:110] == 0).all()
    assert (result.metrics["dropped_frac"] == (result.weights == 0)).all()
    assert assert_same_as_scan(batch, lengths, FipoConfig(max_dual_clipped_tokens=2)).keep.all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_token_leaves_the_others_alone(bad):
    lengths = [20, 40, 3]
    batch = on_device(make_batch(5, lengths, spikes=4))
    config = FipoConfig.preset("7b", impl="triton")
    neutral = [x.clone() for x in batch]
    neutral[0][45] = neutral[1][45] = -1.0
    expected = fipo_weights(*neutral, lengths, config, metrics=())
    others = torch.arange(63) != 45
    for which in (0, 1):
        spoiled = [x.clone() for x in batch]
        spoiled[which][45] = bad
        result = fipo_weights(*spoiled, lengths, config)
        assert torch.equal(result.weights[others], expected.weights[others])
        assert torch.equal(result.future_kl, expected.future_kl) and result.weights.isfinite().all()
        assert result.metrics["nonfinite_frac"].nonzero().flatten().tolist() == [45]


def test_responses_do_not_touch_each_other():
    """Bit for bit, although they share blocks; with other lengths beside them, to rounding."""
    generator = torch.Generator().manual_seed(2)
    lengths = [37, 1, 30, 24]
    parts = [torch.randn(n, generator=generator).to(DEVICE) for n in lengths]
    quiet = future_kl(torch.cat(parts), lengths, 16.0, impl="triton")
    parts[1], parts[3] = parts[1] * 1e30, parts[3] * 1e30
    loud = future_kl(torch.cat(parts), lengths, 16.0, impl="triton")
    for start, stop in ((0, 37), (38, 68)):
        assert torch.equal(quiet[start:stop], loud[start:stop])
        alone = future_kl(torch.cat(parts)[start:stop], [stop - start], 16.0, impl="triton")
        torch.testing.assert_close(alone, quiet[start:stop], rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("tokens", "mask"),
    [
        (torch.bfloat16, torch.bool),
        (torch.float16, torch.int64),
        (torch.float32, torch.uint8),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_every_dtype_is_computed_in_float32(tokens, mask):
    lengths = [20, 1, 30]
    log_probs, old, advantages, loss_mask = make_batch(6, lengths, spikes=5, hole_share=0.3)
    batch = on_device((log_probs.to(tokens), old.to(tokens), advantages.to(tokens), loss_mask.to(mask)))
    config = FipoConfig.preset("7b", decay_over="trained_tokens", impl="triton")
    result = fipo_weights(*batch, lengths, config)
    same = fipo_weights(*(x.float() for x in batch), lengths, config)
    assert result.weights.dtype == result.future_kl.dtype == torch.float32
    assert torch.equal(result.weights, same.weights) and torch.equal(result.future_kl, same.future_kl)
    assert all(torch.equal(result.metrics[name], same.metrics[name]) for name in METRICS)


def test_strided_tokens_and_integer_advantages():
    lengths = [30, 20]
    batch = [torch.stack([x, x], dim=1)[:, 0] for x in make_batch(7, lengths, spikes=5)]
    assert not batch[0].is_contiguous()
    batch[2] = batch[2].sign().long()
    assert_same_as_scan(batch, lengths, FipoConfig())


def test_only_the_metrics_asked_for():
    batch = make_batch(9, [40])
    for metrics in ((), ("dropped_frac", "future_kl", "clip_high_frac")):
        assert_same_as_scan(batch, [40], FipoConfig(), metrics)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # the oracle's 1/τ
def test_extreme_half_lives():
    """As good as no decay, and as good as nothing but decay; a masked token is no distance even then."""
    lengths = [40, 30]
    shift, mask = make_shift(4, lengths, hole_share=0.5)
    mask[28:36], shift[28:36] = False, 0.0  # over a block's edge
    for decay_rate in (1e-310, 1e300):
        for decay_mask in (None, mask):
            result = future_kl(
                torch.from_numpy(shift).to(DEVICE),
                lengths,
                decay_rate,
                decay_mask=None if decay_mask is None else torch.from_numpy(decay_mask).to(DEVICE),
                impl="triton",
            )
            assert worst_error(result.cpu(), oracle.future_kl(shift, lengths, decay_rate, decay_mask)) <= 1e-5


def check_rank(size):
    """One rank of a real group: its share by the kernel, whose block sums are what it exchanges, beside the whole."""
    kernel.BLOCK, kernel.TILE = 64, 4
    sequences = [(150, 116), (66, 65), (166, 165), (300, 20), (5, 3), (64, 0), (40, 1)]  # (total, response)
    lengths = [response for _, response in sequences]
    chunk_lengths = [zigzag_chunk_lengths(total, response, size) for total, response in sequences]
    index, own_lengths = rank_slices(chunk_lengths, dist.get_rank())
    assert [sum(chunks) for chunks in chunk_lengths] == lengths
    log_probs, old, advantages, mask = make_batch(0, lengths, spikes=30, hole_share=0.3)
    for decay_over in DECAY_OVER:
        config = {"decay_over": decay_over, "decay_rate": 100.0, "max_dual_clipped_tokens": 0}
        whole = fipo_weights(log_probs, old, advantages, mask, lengths, FipoConfig(**config, impl="scan"))
        assert 0 < whole.keep.sum() < len(lengths)
        cp = ContextParallel(dist.group.WORLD, chunk_lengths, mask)
        batch = [x[index] for x in (log_probs, old, advantages, mask)]
        part = fipo_weights(*batch, own_lengths, FipoConfig(**config, impl="triton"), cp=cp)
        scale = whole.future_kl.abs().max().item()
        torch.testing.assert_close(part.future_kl, whole.future_kl[index], rtol=0, atol=2e-6 * scale)
        torch.testing.assert_close(part.weights, whole.weights[index], rtol=0, atol=2e-5)
        assert torch.equal(part.keep, whole.keep)
        assert torch.equal(part.metrics["dropped_frac"], whole.metrics["dropped_frac"][index])

    # A micro-batch of which this rank may hold no token at all still takes part in the collective.
    chunk_lengths = [zigzag_chunk_lengths(4000, 3, size)]
    index, own_lengths = rank_slices(chunk_lengths, dist.get_rank())
    batch = [x[:3][index] for x in (log_probs, old, advantages, mask)]
    cp = ContextParallel(dist.group.WORLD, chunk_lengths)
    part = fipo_weights(*batch, own_lengths, FipoConfig(impl="triton"), cp=cp)
    assert not kernel_check.refused_devices
    assert part.weights.numel() == own_lengths[0] == (3 if dist.get_rank() == 0 else 0) and part.keep.shape == (1,)


@pytest.mark.skipif(DEVICE != "cpu", reason="gloo ranks, interpreted; on GPUs the ranks would need one each")
def test_context_parallel_ranks_agree_with_the_whole(tmp_path):
    command = [sys.executable, "-m", __name__, "2", str(tmp_path / "store")]
    ranks = [
        subprocess.Popen([*command, str(rank)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=180)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)


def test_the_serial_scan_that_it_is_timed_against():
    from benchmarks.serial_scan import serial_future_kl

    shift, lengths = torch.randn(74, generator=torch.Generator().manual_seed(0)), [40, 1, 0, 33]
    result = serial_future_kl(shift.to(DEVICE), torch.tensor([0, 40, 41, 41, 74], device=DEVICE), 40, 8.0)
    assert worst_error(result.cpu(), oracle.future_kl(shift.numpy(), lengths, 8.0)) <= 1e-5


def test_the_same_batch_gives_the_same_bits():
    lengths = [70, 3, 60]
    batch = on_device(make_batch(3, lengths, spikes=5))
    first, second = (fipo_weights(*batch, lengths, FipoConfig(impl="triton"), metrics=()) for _ in range(2))
    assert torch.equal(first.weights, second.weights) and torch.equal(first.future_kl, second.future_kl)


@pytest.mark.gpu
@needs_gpu
def test_nothing_waits_for_the_device():
    lengths = [3000, 1, 0, 500]
    batch = on_device(make_batch(3, lengths, spikes=5))
    for decay_over in DECAY_OVER:
        config = FipoConfig(decay_over=decay_over, impl="triton")
        fipo_weights(*batch, lengths, config)  # compile and check first
        torch.cuda.set_sync_debug_mode("error")
        try:
            fipo_weights(*batch, lengths, config)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@needs_gpu
def test_auto_is_the_scan_on_a_gpu_too(monkeypatch):
    calls = []
    real = kernel.kernel_weights
    monkeypatch.setattr(kernel, "kernel_weights", lambda *args: calls.append(1) or real(*args))
    batch = on_device(make_batch(3, [50]))
    fipo_weights(*batch, [50], FipoConfig())
    assert not calls
    fipo_weights(*batch, [50], FipoConfig(impl="triton"))
    assert calls


def run_python(*arguments, **environment):
    """This interpreter without the one of Triton."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def test_it_compiles_for_a_gpu(tmp_path):
    """By Triton's own compiler and ptxas, down to machine code, whether there is a GPU or not."""
    if not (Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump").exists():
        pytest.skip("this Triton comes without NVIDIA's tools")
    result = run_python("-m", "tests.algorithm.compile_kernel", "90", TRITON_CACHE_DIR=str(tmp_path))
    assert result.returncode == 0, result.stderr
    launches = [json.loads(line) for line in result.stdout.splitlines()]
    names = [launch["launch"] for launch in launches]
    assert names == ["_sum_blocks", "_weigh", "_sum_blocks", "_sum_heads", "_weigh", "_sum_blocks", "_weigh"]
    for launch in launches:
        assert launch["registers"] <= 160 and launch["stack"] + launch["local"] <= 32, f"registers spill: {launch}"
        assert launch["wide"] or launch["launch"] == "_sum_heads", launch


def test_nothing_loads_the_kernel_that_does_not_want_it():
    result = run_python(
        "-c",
        inspect.cleandoc("""
        import sys, torch
        import slime_fipo
        assert "triton" not in sys.modules and "torch._dynamo" not in sys.modules
        token = torch.zeros(4)
        slime_fipo.fipo_weights(token, token, token, token, [4], slime_fipo.FipoConfig())
        assert "slime_fipo.algorithm.kernel" not in sys.modules
        """),
    )
    assert result.returncode == 0, result.stderr


if __name__ == "__main__":
    world_size, store, rank = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    check_rank(world_size)
    dist.destroy_process_group()
