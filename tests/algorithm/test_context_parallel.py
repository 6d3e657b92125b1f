"""Context parallelism over real gloo process groups: every rank's numbers equal the unsharded ones."""

import os
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from slime_fipo import FipoConfig, fipo_weights
from slime_fipo.algorithm import ContextParallel

from .test_weights import make_batch

CONFIGS = {
    "positions": FipoConfig.preset("7b"),
    "trained_tokens": FipoConfig.preset("7b", decay_over="trained_tokens"),
    "chunked": FipoConfig(impl="chunked", chunk_size=32, decay_rate=256.0),
    "short half-life": FipoConfig(decay_rate=0.5, dual_clip_c=2.0, max_dual_clipped_tokens=3),
    "no dual clip": FipoConfig(dual_clip_c=None, clip_influence=False, decay_rate=4096.0),
}
# (total length, response length): prompts of any length, responses of length 0 and 1, and one that fits one chunk.
SEQUENCES = [(900, 700), (37, 1), (64, 0), (401, 400), (2000, 20), (5, 3), (1001, 999)]


def zigzag_chunk_lengths(total, response, size):
    """Response tokens in each of the 2·size chunks; logits positions, so a token sits where its predecessor does."""
    chunk = -(-total // (2 * size))
    starts = [i * chunk for i in range(2 * size)]
    return [max(0, min(s + chunk, total - 1) - max(s, total - response - 1)) for s in starts]


def rank_slices(chunk_lengths, rank):
    """This rank's token indices in the packed whole responses, and its lengths."""
    size = len(chunk_lengths[0]) // 2
    index, lengths, start = [], [], 0
    for chunks in chunk_lengths:
        bounds = [start + sum(chunks[:i]) for i in range(2 * size + 1)]
        own = [range(bounds[c], bounds[c + 1]) for c in (rank, 2 * size - 1 - rank)]
        index += [i for part in own for i in part]
        lengths.append(sum(map(len, own)))
        start = bounds[-1]
    return torch.tensor(index, dtype=torch.int64), lengths


def check_all(rank, size):
    for seed, dtype in ((0, torch.float32), (1, torch.float64)):
        lengths = [response for _, response in SEQUENCES]
        batch = make_batch(seed, lengths, spikes=40, hole_share=0.3, dtype=dtype)
        chunk_lengths = [zigzag_chunk_lengths(total, response, size) for total, response in SEQUENCES]
        assert [sum(chunks) for chunks in chunk_lengths] == lengths
        index, own_lengths = rank_slices(chunk_lengths, rank)
        for name, config in CONFIGS.items():
            whole = fipo_weights(*batch, lengths, config)
            assert name != "positions" or 0 < whole.keep.sum() < len(lengths), "some responses must be dropped"
            cp = ContextParallel(dist.group.WORLD, chunk_lengths, batch[3])
            part = fipo_weights(*(x[index] for x in batch), own_lengths, config, cp=cp)
            tolerance = 1e-5 if dtype == torch.float32 else 1e-12
            scale = max(1.0, whole.future_kl.abs().max().item())
            assert (part.future_kl - whole.future_kl[index]).abs().max() <= tolerance * scale, name
            torch.testing.assert_close(part.weights, whole.weights[index], rtol=0, atol=10 * tolerance, msg=name)
            assert torch.equal(part.keep, whole.keep), name
            assert part.metrics.keys() == whole.metrics.keys()

    # A micro-batch in which this rank may hold no token at all still takes part in the collective.
    log_probs, old, advantages, mask = make_batch(2, [3])
    chunk_lengths = [zigzag_chunk_lengths(4000, 3, size)]
    index, own_lengths = rank_slices(chunk_lengths, rank)
    cp = ContextParallel(dist.group.WORLD, chunk_lengths)
    whole = fipo_weights(log_probs, old, advantages, mask, [3], FipoConfig())
    part = fipo_weights(log_probs[index], old[index], advantages[index], mask[index], own_lengths, FipoConfig(), cp=cp)
    torch.testing.assert_close(part.weights, whole.weights[index])
    assert size == 1 or (own_lengths == [0]) == (rank != 0)


def check_neighbours(rank, size):
    """Bit for bit, what else is in the batch makes no difference to a response whose chunks are the same."""
    lengths = [response for _, response in SEQUENCES]
    batch = make_batch(3, lengths, spikes=40, hole_share=0.3)
    chunk_lengths = [zigzag_chunk_lengths(total, response, size) for total, response in SEQUENCES]
    for decay_over in ("positions", "trained_tokens"):
        config = FipoConfig(decay_over=decay_over, decay_rate=100.0)

        def part(which, config=config):
            tokens = [torch.cat([x.split(lengths)[i] for i in which]) for x in batch]
            index, own_lengths = rank_slices([chunk_lengths[i] for i in which], rank)
            cp = ContextParallel(dist.group.WORLD, [chunk_lengths[i] for i in which], tokens[3])
            result = fipo_weights(*(x[index] for x in tokens), own_lengths, config, cp=cp)
            return zip(which, result.weights.split(own_lengths), result.future_kl.split(own_lengths), strict=True)

        together = {i: values for i, *values in part([5, 0, 2, 6, 1, 4, 3])}
        for i, *values in [*part([3]), *part([0, 4]), *part([6, 0, 3])]:
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(values, together[i], strict=True)), i


def bad_on_one_rank(name, own, cp, config):
    """(batch and lengths, cp, config) that only this rank refuses, or that differ from the other rank's."""
    log_probs, old, advantages, mask, lengths = own
    chunks = [list(row) for row in cp.chunk_lengths]
    if name == "lengths":
        lengths = [n + 1 for n in lengths]
    elif name == "tokens":
        log_probs = log_probs[:-1]
    elif name == "type":
        old = old.tolist()
    elif name == "mask":
        cp = replace(cp, response_loss_mask=cp.response_loss_mask[:-1])
    elif name == "no mask":
        cp = replace(cp, response_loss_mask=None)
    elif name == "negative":
        chunks[0][0], chunks[0][1] = -1, chunks[0][1] + 1
        cp = replace(cp, chunk_lengths=chunks)
    elif name == "fractional":
        chunks[0][0] += 0.5
        cp = replace(cp, chunk_lengths=chunks)
    elif name == "other chunks":  # fits this rank, but is not what the other rank has
        chunks[0][1 - dist.get_rank()] += 1
        cp = replace(cp, chunk_lengths=chunks, response_loss_mask=torch.ones(sum(map(sum, chunks))))
    elif name == "other settings":
        config = replace(config, decay_rate=33.0)
    return (log_probs, old, advantages, mask, lengths), cp, config


REFUSED_HERE = ("lengths", "tokens", "type", "mask", "no mask", "negative", "fractional")
DIFFERENT_HERE = ("other chunks", "other settings")


def check_that_all_ranks_raise(rank, size):
    """What one rank refuses raises on every rank, and the group goes on working afterwards."""
    chunk_lengths = [zigzag_chunk_lengths(total, response, size) for total, response in [(40, 30), (20, 9)]]
    index, own_lengths = rank_slices(chunk_lengths, rank)
    batch = make_batch(0, [30, 9])
    own = (*(x[index] for x in batch), own_lengths)
    config = FipoConfig(decay_over="trained_tokens")
    cp = ContextParallel(dist.group.WORLD, chunk_lengths, batch[3])
    for culprit in range(size):
        for name in (*REFUSED_HERE, *DIFFERENT_HERE):
            arguments, layout, settings = (own, cp, config)
            if rank == culprit:
                arguments, layout, settings = bad_on_one_rank(name, own, cp, config)
            try:
                fipo_weights(*arguments, settings, cp=layout)
            except (ValueError, RuntimeError) as error:
                own_error = rank == culprit and name in REFUSED_HERE
                assert isinstance(error, ValueError) == own_error, (name, error)
                assert own_error or "a rank of cp.group refused its part" in str(error), (name, error)
            else:
                raise AssertionError(f"{name} on rank {culprit} did not raise on rank {rank}")
    fipo_weights(*own, config, cp=cp)

    # No responses: no collective, so that a rank alone may call it, or refuse it.
    empty, none = torch.empty(0), ContextParallel(dist.group.WORLD, [])
    if rank == 0:
        for decay_over in ("positions", "trained_tokens"):
            nothing = replace(none, response_loss_mask=empty)
            result = fipo_weights(empty, empty, empty, empty, [], FipoConfig(decay_over=decay_over), cp=nothing)
            assert result.weights.shape == (0,) and result.keep.shape == (0,)
        with pytest.raises(ValueError, match="lengths add up to 0; they must add up to"):
            fipo_weights(*own[:4], [], config, cp=none)
    fipo_weights(*own, config, cp=cp)


@pytest.mark.parametrize(
    ("check", "size"),
    [("check_all", 1), ("check_all", 2), ("check_all", 4), ("check_neighbours", 2), ("check_that_all_ranks_raise", 2)],
)
def test_ranks(check, size, tmp_path):
    command = [sys.executable, "-m", __name__, check, str(size), str(tmp_path / "store")]
    root = Path(__file__).parents[2]
    ranks = [
        subprocess.Popen(
            [*command, str(rank)], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ
        )
        for rank in range(size)
    ]
    try:
        outputs = [rank.communicate(timeout=180)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * size, "\n".join(outputs)


class Unconnected(ContextParallel):
    """Rank 0 of 2 without the other, whose part of the collective is left out."""

    def _all_gather(self, packet):
        return packet.expand(2, *packet.shape)


class FakeGroup:
    def rank(self):
        return 0

    def size(self):
        return 2


@pytest.mark.parametrize(
    ("chunk_lengths", "lengths", "config", "message"),
    [
        ([[2, 2]], [4], FipoConfig(), r"cp.chunk_lengths has shape \(1, 2\); it must be \(1, 4\)"),
        ([[1, 1, 1, 1]], [4], FipoConfig(), r"chunks \[0, 3\] of cp.chunk_lengths: \[2\]; it is \[4\]"),
        ([[2, 1, 1, 2]], [4], FipoConfig(decay_over="trained_tokens"), "cp.response_loss_mask .* is a NoneType"),
        ([[5, 1, 1, -1]], [4], FipoConfig(), "cp.chunk_lengths holds -1"),
        ([[2.0, 1.0, 1.0, 2.0]], [4], FipoConfig(), "cp.chunk_lengths holds torch.float32"),
        ([[2, 1, 1], [2]], [4], FipoConfig(), "cp.chunk_lengths must be integers"),
        ([], [4], FipoConfig(), r"cp.chunk_lengths has shape \(0,\); it must be \(1, 4\)"),
        (None, [4], FipoConfig(), "cp.chunk_lengths must be integers"),
    ],
)
def test_a_layout_that_does_not_fit(chunk_lengths, lengths, config, message):
    token = torch.zeros(4)
    cp = Unconnected(FakeGroup(), chunk_lengths)
    with pytest.raises(ValueError, match=message):
        fipo_weights(token, token, token, token, lengths, config, cp=cp)


if __name__ == "__main__":
    check, world_size, store, rank = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    torch.set_num_threads(1)
    # A rank that waits for one that does not come gives up, and the test says so.
    timeout = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timeout)
    globals()[check](rank, world_size)
    dist.barrier()  # a rank that ends while others still use its sockets can abort them
    dist.destroy_process_group()
