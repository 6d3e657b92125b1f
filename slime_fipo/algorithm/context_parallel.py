"""Exact Future-KL where a response is spread over context-parallel ranks, with one small all-gather.

The layout is the zigzag one of Megatron and slime: of n ranks, rank r holds chunks r and 2n − 1 − r of every
sequence, end to end; either may hold no response token. What a chunk contributes to everything before it is one
number, its Future-KL at its first token, so the ranks exchange two sums per response and the count that the sequence
filter needs, whatever the length. :func:`own_chunks` and :func:`chunk_edges` are the layout; hosts pass the chunks'
lengths.

No rank is left waiting: a rank that refuses its arguments takes part in the collective first, says so there, and every
rank raises. A batch without responses needs no collective, on any rank.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .packed import check_lengths, check_tokens, per_response_sum, per_token, to_device
from .scan import log_decay_of

REFUSED = -1.0  # sent in place of the fingerprint by a rank that cannot compute its part


def own_chunks(rank: int, size: int) -> tuple[int, int]:
    """The two of a sequence's 2 · ``size`` chunks that ``rank`` holds, in the order in which it holds them."""
    return rank, 2 * size - 1 - rank


def chunk_edges(total: int, response: int, chunk_size: int, size: int) -> list[int]:
    """Where the chunks of a sequence begin and end in its response [2 · size + 1]: chunk k has tokens [e_k, e_k+1).

    A response token belongs to the chunk of the position before it, whose logit predicts it.

    Args:
        total, response: tokens of the whole sequence and of its response.
        chunk_size: positions per chunk.
    """
    first = total - response - 1  # position of the logit that predicts the first response token
    inner = (min(max(k * chunk_size - first, 0), response) for k in range(1, 2 * size))
    return [0, *inner, response]


@dataclass(frozen=True)
class ContextParallel:
    """How the responses of a micro-batch are spread over a context-parallel group of n ranks.

    Args:
        group: the process group; every one of its ranks must make the same calls, with the same number of responses.
        chunk_lengths: [B][2n] response tokens in each chunk of each sequence, in sequence order, the same on all ranks.
        response_loss_mask: the loss mask of whole responses [sum of chunk_lengths], packed; read only with
            ``decay_over="trained_tokens"``, which needs to know how many trained tokens other ranks hold.
    """

    group: dist.ProcessGroup
    chunk_lengths: Sequence[Sequence[int]]
    response_loss_mask: Tensor | None = None

    def check(self, lengths: Tensor, trained_tokens: bool) -> Tensor:
        """``chunk_lengths`` as an int64 CPU tensor [B, 2n], once it agrees with this rank's ``lengths`` [B].

        Raises:
            ValueError: shape, values, sums or a missing ``response_loss_mask``.
        """
        wanted = (lengths.numel(), 2 * self.group.size())
        try:
            chunks = torch.as_tensor(self.chunk_lengths, device="cpu")
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ValueError(f"cp.chunk_lengths must be integers, {wanted}: [B][2 · group size]; {error}") from error
        if tuple(chunks.shape) != wanted and not (chunks.shape[:1] == (0,) == wanted[:1]):
            raise ValueError(
                f"cp.chunk_lengths has shape {tuple(chunks.shape)}; it must be {wanted}: [B][2 · group size]"
            )
        chunks = check_lengths(chunks.flatten(), name="cp.chunk_lengths").view(wanted)
        if not torch.equal(self._own(chunks).sum(1), lengths):
            raise ValueError(
                f"lengths must be this rank's tokens per response, chunks {self.own_chunks} of cp.chunk_lengths:"
                f" {self._own(chunks).sum(1).tolist()}; it is {lengths.tolist()}"
            )
        if trained_tokens:
            name = "cp.response_loss_mask (which decay_over='trained_tokens' needs)"
            check_tokens(name, self.response_loss_mask, floating=False)
            if self.response_loss_mask.numel() != int(chunks.sum()):
                raise ValueError(
                    f"{name} has {self.response_loss_mask.numel()} tokens; whole responses have {int(chunks.sum())}"
                )
        return chunks

    @property
    def own_chunks(self) -> list[int]:
        """This rank's chunks, :func:`own_chunks`."""
        return list(own_chunks(self.group.rank(), self.group.size()))

    def _own(self, chunks: Tensor) -> Tensor:
        return chunks[:, self.own_chunks]

    def segments(self, chunks: Tensor) -> Tensor:
        """Lengths of this rank's 2B chunks in packed order, int64 [2B]."""
        return self._own(chunks).flatten()

    def carry(
        self, local: Tensor, counts: Tensor, chunks: Tensor, decay_rate: float, trained: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Add to each token what later chunks contribute, and sum counts over the group. Calls :meth:`exchange`.

        Args:
            local: Future-KL [T] of this rank's tokens within their chunks alone.
            counts: per-response counts of this rank [B].
            chunks: what :meth:`check` returned.
            decay_rate: τ.
            trained: this rank's trained tokens [T] if only they count as distance, else None.

        Returns:
            Future-KL [T] over whole responses, and the counts' sums over the group [B].
        """
        segments = self.segments(chunks)
        ends = segments.cumsum(0)
        padded = torch.cat([local, local.new_zeros(1)])
        first = torch.where(segments > 0, ends - segments, local.numel())
        heads = padded[to_device(first, local.device)]  # 0 if empty
        behind, all_counts = self.exchange(heads, counts, chunks, decay_rate, trained is not None)

        # From a token to the first token of the next chunk: the tokens of [t, end of chunk) that count.
        counted = torch.ones_like(local, dtype=torch.int32) if trained is None else trained.to(torch.int32)
        until = counted.cumsum(0, dtype=torch.int32)
        at_end = torch.cat([until, until.new_zeros(1)])[to_device(ends - 1, local.device)]
        remaining = per_token(at_end, segments) - until + counted
        decay = torch.exp(remaining.to(local.dtype) * log_decay_of(decay_rate))
        return torch.addcmul(local, decay, per_token(behind, segments)), all_counts

    def exchange(
        self, heads: Tensor, counts: Tensor, chunks: Tensor, decay_rate: float, trained_tokens: bool
    ) -> tuple[Tensor, Tensor]:
        """From the chunks' own sums to what follows each of them: one all-gather of three numbers per response.

        Args:
            heads: Future-KL at the first token of each of this rank's chunks, within the chunk alone, 0 if empty [2B].
            counts, chunks, decay_rate: as for :meth:`carry`.
            trained_tokens: only trained tokens count as distance.

        Returns:
            Future-KL at the first token behind each of this rank's chunks [2B], and the counts' sums over the group
            [B], both in the dtype of ``heads``.

        Raises:
            RuntimeError: another rank refused its arguments, or has other chunk lengths or settings; on a GPU when the
                host next waits for it, so that this call does not.
        """
        if not chunks.numel():
            return heads, counts.to(heads.dtype)
        settings = repr((chunks.tolist(), float(decay_rate), trained_tokens))
        fingerprint = float(zlib.crc32(settings.encode()))
        packet = torch.cat([heads.view(-1, 2), counts.to(heads.dtype)[:, None]], dim=1).double()
        gathered = self._all_gather(torch.cat([packet, packet.new_full((1, 3), fingerprint)]))
        torch._assert_async(
            (gathered[:, -1] == fingerprint).all(),
            "a rank of cp.group refused its part of this micro-batch (its own error says why),"
            " or has other cp.chunk_lengths, decay_rate or decay_over",
        )
        early, late, all_counts = gathered[:, :-1].to(heads.dtype).unbind(2)

        # The chunks' heads obey the tokens' own recurrence, with a chunk's length as its distance.
        head = torch.cat([early, late.flip(0)])  # [2n, B] in sequence order
        if trained_tokens:
            distance = per_response_sum(self.response_loss_mask != 0, chunks.flatten()).to(head.dtype)
        else:
            distance = to_device(chunks.flatten(), head.device).to(head.dtype)
        decay = torch.exp(distance.view(-1, len(head)).t() * log_decay_of(decay_rate))
        behind = torch.zeros_like(head)
        for chunk in range(len(head) - 2, -1, -1):
            behind[chunk] = torch.addcmul(head[chunk + 1], decay[chunk + 1], behind[chunk + 1])
        return self._own(behind.t()).flatten(), all_counts.sum(0)

    def refuse(self, *tokens) -> None:
        """Take part in :meth:`exchange` without a part, so that it raises on the other ranks: none waits for this one.

        Args:
            tokens: this rank's tensors, as far as they are some: the packet goes where they are.
        """
        responses = len(self.chunk_lengths) if hasattr(self.chunk_lengths, "__len__") else 0
        device = next((t.device for t in (*tokens, self.response_loss_mask) if isinstance(t, Tensor)), None)
        if responses:
            self._all_gather(torch.full((responses + 1, 3), REFUSED, dtype=torch.float64, device=device))

    def alone(self) -> ContextParallel:
        """This layout with an :meth:`exchange` that calls no collective: every rank's part is this one's."""
        return _Alone(**vars(self))

    def _all_gather(self, packet: Tensor) -> Tensor:
        """Every rank's packet [B + 1, 3], as [n, B + 1, 3]; in float64, whatever each rank computes in."""
        gathered = packet.new_empty(self.group.size() * packet.shape[0], packet.shape[1])
        dist.all_gather_into_tensor(gathered, packet, group=self.group)
        return gathered.view(self.group.size(), *packet.shape)


class _Alone(ContextParallel):
    def _all_gather(self, packet: Tensor) -> Tensor:
        return packet.expand(self.group.size(), *packet.shape)
