"""Context parallelism over real gloo process groups: every rank's numbers equal the unsharded ones."""

import os
import subprocess
import sys
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


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_agree_with_the_whole(size, tmp_path):
    command = [sys.executable, "-m", __name__, str(size), str(tmp_path / "store")]
    root = Path(__file__).parents[2]
    ranks = [
        subprocess.Popen(
            [*command, str(rank)], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ
        )
        for rank in range(size)
    ]
    outputs = [rank.communicate(timeout=180)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * size, "\n".join(outputs)


class FakeGroup:
    """Rank 0 of 2, for checks that stop before any collective."""

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
    ],
)
def test_a_layout_that_does_not_fit(chunk_lengths, lengths, config, message):
    token = torch.zeros(4)
    cp = ContextParallel(FakeGroup(), chunk_lengths)
    with pytest.raises(ValueError, match=message):
        fipo_weights(token, token, token, token, lengths, config, cp=cp)


if __name__ == "__main__":
    world_size, store, rank = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    check_all(rank, world_size)
    dist.destroy_process_group()
