"""One FIPO loss with a context-parallel rank on every node of a Ray cluster, before any GPU is taken.

Run as a Ray job (``PROBE=1 run-embedded.sh``). It shows that every node joined, that processes on them reach each
other over gloo, that they can all import slime_fipo, and that the ranks' loss equals the unsharded one.
"""

import itertools
import json
import os
import socket
import sys

import ray
import torch
import torch.distributed as dist
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from slime_fipo import FipoConfig, fipo_policy_loss, fipo_weights
from slime_fipo.algorithm import ContextParallel
from slime_fipo.algorithm.context_parallel import own_chunks

RESPONSES = (1500, 1, 640, 97)
CONFIG = FipoConfig.preset("7b")


def batch():
    """Packed log_probs, old_log_probs, advantages and loss_mask of the same made-up responses on every node."""
    generator = torch.Generator().manual_seed(0)
    tokens = sum(RESPONSES)
    old = -torch.rand(tokens, generator=generator) * 3
    shift = torch.randn(tokens, generator=generator) * 0.05
    advantages = torch.cat([torch.full((n,), 1.0 if i % 2 else -1.0) for i, n in enumerate(RESPONSES)])
    return old + shift, old, advantages, torch.ones(tokens, dtype=torch.int64)


def zigzag(rank: int, size: int) -> tuple[torch.Tensor, list[int], list[list[int]]]:
    """Indices of a rank's tokens, its tokens per response, and all chunk lengths, where a sequence is its response."""
    index, lengths, chunk_lengths, start = [], [], [], 0
    for n in RESPONSES:
        edges = [min(start + i * -(-n // (2 * size)), start + n) for i in range(2 * size + 1)]
        chunk_lengths.append([b - a for a, b in itertools.pairwise(edges)])
        own = [i for c in own_chunks(rank, size) for i in range(edges[c], edges[c + 1])]
        index, lengths, start = index + own, [*lengths, len(own)], start + n
    return torch.tensor(index), lengths, chunk_lengths


@ray.remote(num_cpus=0)
class Rank:
    def address(self) -> tuple[str, int]:
        """An address of this node and a port that is free there, for the group's rendezvous."""
        with socket.socket() as s:
            s.bind(("", 0))
            return ray.util.get_node_ip_address(), s.getsockname()[1]

    def loss(self, rank: int, size: int, address: str, port: int) -> tuple[float, str]:
        """Sum of the FIPO loss over this rank's tokens, and the node that computed it."""
        # gloo's address must be this node's own, not what its host name resolves to.
        os.environ.setdefault("MASTER_ADDR", address)
        dist.init_process_group("gloo", init_method=f"tcp://{address}:{port}", rank=rank, world_size=size)
        try:
            index, lengths, chunk_lengths = zigzag(rank, size)
            log_probs, old, advantages, mask = (x[index] for x in batch())
            cp = ContextParallel(dist.group.WORLD, chunk_lengths)
            weights = fipo_weights(log_probs, old, advantages, mask, lengths, CONFIG, cp=cp).weights
            ratio = (log_probs - old).exp()
            clipped = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.28))
            loss = (weights * clipped).sum()
            dist.all_reduce(loss)
            return loss.item(), ray.get_runtime_context().get_node_id()
        finally:
            dist.destroy_process_group()


def main() -> None:
    ray.init()
    nodes = sorted((n for n in ray.nodes() if n["Alive"]), key=lambda n: n["NodeManagerAddress"])
    ranks = [
        Rank.options(scheduling_strategy=NodeAffinitySchedulingStrategy(n["NodeID"], soft=False)).remote()
        for n in nodes
    ]
    address, port = ray.get(ranks[0].address.remote())
    results = ray.get([r.loss.remote(i, len(ranks), address, port) for i, r in enumerate(ranks)], timeout=300)
    whole = fipo_policy_loss(*batch(), RESPONSES, CONFIG)[0].sum().item()

    placed = [node_id for _, node_id in results] == [n["NodeID"] for n in nodes]
    equal = all(abs(loss - whole) <= 1e-4 * max(1.0, abs(whole)) for loss, _ in results)
    report = {
        "nodes": [n["NodeManagerAddress"] for n in nodes],
        "context_parallel_size": len(ranks),
        "loss": results[0][0],
        "unsharded_loss": whole,
    }
    print("probe_nodes:", json.dumps(report), flush=True)
    if not (placed and equal):
        sys.exit("probe_nodes: the ranks' loss is not the unsharded one, or a rank ran on another node than its own")


if __name__ == "__main__":
    main()
