"""Who asks for ``triton`` gets it checked: faults that really happen are one warning, and the scan computes instead."""

import inspect
import logging
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from slime_fipo import FipoConfig, fipo_weights, future_kl
from slime_fipo.algorithm import ContextParallel, kernel_check, weights
from slime_fipo.algorithm.config import DECAY_OVER

from .test_context_parallel import rank_slices, zigzag_chunk_lengths
from .test_kernel import DEVICE, ROOT, kernel, needs_kernel, on_device, use_blocks
from .test_weights import make_batch

LENGTHS = [70, 0, 33]
WARNING = "--fipo-impl triton cannot be used on"


@pytest.fixture(autouse=True)
def _unchecked(monkeypatch):
    """As in a process that has not asked for the kernel yet; blocks as small as the interpreter needs."""
    use_blocks(monkeypatch, 32)
    forget(monkeypatch)


def forget(patch):
    patch.setattr(kernel_check, "_agreed", set())
    patch.setattr(kernel_check, "refused_devices", set())


def weigh(impl, batch, lengths=LENGTHS, **settings):
    return fipo_weights(*on_device(batch), lengths, FipoConfig(impl=impl, **settings))


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("slime_fipo")]


@needs_kernel
def test_a_kernel_that_agrees_is_used_and_compared_once(monkeypatch, caplog):
    probes = []
    monkeypatch.setattr(weights, "moved", lambda x: probes.append(1) or kernel_check.moved(x))
    batch = [x.double() for x in make_batch(0, LENGTHS, spikes=3, hole_share=0.3)]
    for _ in range(3):
        assert weigh("triton", batch).weights.dtype == torch.float32  # the scan's would be float64
    assert len(probes) == 1
    weigh("triton", batch, decay_over="trained_tokens")  # another program
    assert len(probes) == 2 and not warnings_of(caplog)


@needs_kernel
@pytest.mark.parametrize("on_policy", [False, True], ids=["off policy", "on policy"])
@pytest.mark.parametrize(
    ("name", "fault", "reason"),
    [
        ("log2_decay_of", lambda rate: -2 / rate, "its Future-KL differs from the scan's by"),
        ("log2_decay_of", lambda rate: float("nan"), "its Future-KL differs from the scan's by nan"),
        ("SAFETY_BOUNDS", (0.8, 1.1), "its weights differs from the scan's by"),
        ("BLOCK", 33, "power of 2"),
    ],
    ids=["wrong decay", "NaN", "wrong bounds", "does not compile"],
)
def test_a_kernel_that_is_wrong_is_one_warning_and_the_scan(name, fault, reason, on_policy, monkeypatch, caplog):
    """Also on policy, where every log-ratio is 0 and a wrong decay could not be seen in the batch itself."""
    monkeypatch.setattr(kernel, name, fault)
    batch = make_batch(0, LENGTHS, spikes=3)
    batch = (batch[0], batch[0] if on_policy else batch[1], -batch[2].abs(), batch[3])
    settings = {"safety_thresh": 1.05, "max_dual_clipped_tokens": None}
    for decay_over in DECAY_OVER * 2:
        expected = weigh("scan", batch, decay_over=decay_over, **settings)
        result = weigh("triton", batch, decay_over=decay_over, **settings)
        assert torch.equal(result.weights, expected.weights) and torch.equal(result.future_kl, expected.future_kl)
    [warning] = warnings_of(caplog)
    assert warning.startswith(WARNING) and reason in warning and "\n" not in warning
    if name != "SAFETY_BOUNDS":
        forget(monkeypatch)
        caplog.clear()
        shift = (batch[0] - batch[1]).to(DEVICE)
        for _ in range(2):
            assert torch.equal(future_kl(shift, LENGTHS, 8.0, impl="triton"), future_kl(shift, LENGTHS, 8.0))
        assert len(warnings_of(caplog)) == 1


@needs_kernel
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    lengths=st.lists(st.sampled_from([0, 1, 31, 32, 33, 70]), max_size=4),
    decay_rate=st.sampled_from([0.5, 32.0, 4096.0]),
    sigma=st.sampled_from([0.0, 0.3, 30.0]),
    hole_share=st.sampled_from([0.0, 0.4, 1.0]),
    bad=st.sampled_from([None, float("nan"), float("inf"), float("-inf")]),
    c=st.sampled_from([None, 3.0]),
    decay_over=st.sampled_from(DECAY_OVER),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_no_false_alarm(seed, lengths, decay_rate, sigma, hole_share, bad, c, decay_over, dtype):
    """Whatever the batch holds: empty responses, holes, values that are not finite, sums that overflow."""
    *floats, mask = make_batch(seed, lengths, sigma=sigma, spikes=3, hole_share=hole_share)
    floats = [x.to(dtype) for x in floats]
    if bad is not None:
        floats[seed % 3][::5] = bad
    config = {"decay_rate": decay_rate, "dual_clip_c": c, "decay_over": decay_over}
    with pytest.MonkeyPatch.context() as patch:
        use_blocks(patch, 32)
        forget(patch)
        weigh("triton", [*floats, mask], lengths, **config)
        future_kl((floats[0] * 1e37).to(DEVICE), lengths, decay_rate, impl="triton")
        assert not kernel_check.refused_devices


@needs_kernel
def test_overflow_does_not_reach_a_neighbour():
    """Responses that share a block; infinity times a decay of 0 would be NaN."""
    shift = torch.cat([torch.randn(10), torch.full((20,), 3e38), torch.randn(5)]).to(DEVICE)
    result = future_kl(shift, [10, 20, 5], 4096.0, impl="triton")
    quiet = future_kl(torch.cat([shift[:10], torch.zeros(20, device=DEVICE), shift[30:]]), [10, 20, 5], 4096.0)
    torch.testing.assert_close(result[:10], quiet[:10])
    torch.testing.assert_close(result[30:], quiet[30:])


SCRIPT = """
import logging, sys, torch
logging.basicConfig(format="%(message)s", stream=sys.stdout)
{fault}
import slime_fipo
token = torch.linspace(-1, 1, 90)
batch = (token, token.flip(0), token.sin(), torch.ones(90))
scan = slime_fipo.fipo_weights(*batch, [60, 30], slime_fipo.FipoConfig())
for _ in range(2):
    result = slime_fipo.fipo_weights(*batch, [60, 30], slime_fipo.FipoConfig(impl="triton"))
    assert torch.equal(result.weights, scan.weights) and torch.equal(result.future_kl, scan.future_kl)
    future = slime_fipo.future_kl(token, [60, 30], 32.0, impl="triton")
    assert torch.equal(future, slime_fipo.future_kl(token, [60, 30], 32.0))
"""
# Triton takes its CUDA driver where torch says that there is a GPU; loading it is what needs a C compiler.
ASK_FOR_CUDA = "torch.cuda.is_available = lambda: True"


@pytest.mark.parametrize(
    ("fault", "environment", "reason"),
    [
        ("sys.modules['triton'] = None", {}, "Triton cannot be imported (ModuleNotFoundError: import of triton halted"),
        ("", {"PYTHONPATH": "{tmp_path}"}, "Triton cannot be imported (ImportError: libtriton.so: undefined symbol)"),
        (
            ASK_FOR_CUDA,
            {"PATH": "{tmp_path}", "TRITON_LIBCUDA_PATH": "{tmp_path}", "TRITON_CACHE_DIR": "{tmp_path}/cache"},
            "Failed to find C compiler. Please specify via CC environment variable",
        ),
        pytest.param("", {}, "active driver", marks=pytest.mark.skipif(DEVICE != "cpu", reason="there is a driver")),
    ],
    ids=["no Triton", "broken Triton", "no C compiler", "no GPU"],
)
def test_what_really_fails_is_one_line(fault, environment, reason, tmp_path):
    """In a process of its own without the interpreter, through Triton's own loading and launching."""
    if "PYTHONPATH" in environment:
        (tmp_path / "triton").mkdir()
        (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('libtriton.so: undefined symbol')\n")
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "CC")}
    environment = clean | {name: value.format(tmp_path=tmp_path) for name, value in environment.items()}
    process = subprocess.run(
        [sys.executable, "-c", inspect.cleandoc(SCRIPT).format(fault=fault)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout + process.stderr
    lines = [line for line in process.stdout.splitlines() if line]
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"{WARNING} cpu, the scan computes instead: ") and reason in lines[0]


def check_rank(rank, size):
    """Rank 0's kernel is right, rank 1's is wrong; rank 1 has no token of the first micro-batch."""
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    kernel.BLOCK, kernel.TILE = 32, 4
    if rank == 1:
        kernel.log2_decay_of = lambda rate: -2 / rate
    for sequences in ([(4000, 3)], [(150, 116), (64, 0), (66, 65)], [(90, 80), (40, 1)]):
        lengths = [response for _, response in sequences]
        chunk_lengths = [zigzag_chunk_lengths(total, response, size) for total, response in sequences]
        index, own_lengths = rank_slices(chunk_lengths, rank)
        batch = make_batch(0, lengths, spikes=9, hole_share=0.3)
        for decay_over in DECAY_OVER:
            cp = ContextParallel(dist.group.WORLD, chunk_lengths, batch[3])
            whole = fipo_weights(*batch, lengths, FipoConfig(decay_over=decay_over))
            config = FipoConfig(decay_over=decay_over, impl="triton")
            part = fipo_weights(*(x[index] for x in batch), own_lengths, config, cp=cp)
            torch.testing.assert_close(part.weights, whole.weights[index], rtol=0, atol=2e-5)
            assert torch.equal(part.keep, whole.keep)
    assert bool(kernel_check.refused_devices) == (rank == 1)


@pytest.mark.skipif(DEVICE != "cpu", reason="gloo ranks, interpreted; on GPUs the ranks would need one each")
def test_a_rank_may_fall_back_alone(tmp_path):
    command = [sys.executable, "-m", __name__, str(tmp_path / "store")]
    ranks = [
        subprocess.Popen([*command, str(rank)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)
    assert [output.count(WARNING) for output in outputs] == [0, 1]


if __name__ == "__main__":
    store, own_rank = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(1)
    wait = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{Path(store)}", rank=own_rank, world_size=2, timeout=wait)
    check_rank(own_rank, 2)
    dist.destroy_process_group()
