"""FIPO's weights on a GPU: ``fipo_weights`` fused into two Triton launches, parallel along each response.

The packed tokens are cut into blocks of ``BLOCK`` wherever responses end, so ragged lengths cost nothing. Launch 1
(``_sum_blocks``) leaves one number per block, the Future-KL at its first token as if nothing came after the block, and
counts each response's dual-clipped tokens. Launch 2 (``_weigh``) scans every block in parallel from its last token to
its first, adds what the response's later blocks contribute, which it sums from launch 1's numbers, and writes weights,
Future-KL and the metrics asked for. The sequence filter needs a whole response's count before its first weight, so two
passes over the inputs are the fewest possible. With context parallelism a third, tiny launch in between
(``_sum_heads``) gives the ranks what they exchange.

As in ``scan.py`` every decay is exp2(−distance/τ), 0 behind a response's last token. All is computed in float32. Float
sums have a fixed order and only integers are added atomically, so results are deterministic. Nothing is read back to
the host; token offsets are int64.

Bytes per token with float32 log-probs and advantages, an int32 mask and m metrics beside Future-KL: launch 1 reads 12
(advantages only where a ratio is above c), launch 2 reads 16 and writes 8 + 4m. That makes 36 + 4m, of which 24 + 4m
must move in any case: 80 against 68 with all metrics (m = 11), 36 against 24 with none. What launch 1 leaves is 4 or 8
bytes per block.

The only module that imports Triton; ``kernel_check.py`` imports it when the kernel is wanted.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import LARGEST_INTEGER, SAFETY_BOUNDS, FipoConfig
from .context_parallel import ContextParallel
from .packed import to_device
from .scan import log2_decay_of

BLOCK = 1024  # tokens per program
TILE = 128  # block sums per step of the sum over later blocks
NUM_WARPS = 4

_LOG_2 = tl.constexpr(math.log(2))
_LOG_3 = tl.constexpr(math.log(3))
_LOG_4 = tl.constexpr(math.log(4))


@triton.jit
def _load(pointer, offset, inside, whole):
    """Load a block. A mask that the compiler cannot see through forbids wide loads, so whole blocks do without."""
    if whole:  # noqa: SIM108
        value = tl.load(pointer + offset)
    else:
        value = tl.load(pointer + offset, mask=inside, other=0)
    return value


@triton.jit
def _store(pointer, offset, value, inside, whole):
    """Store a block as float32."""
    value = value.to(tl.float32)
    if whole:
        tl.store(pointer + offset, value)
    else:
        tl.store(pointer + offset, value, mask=inside)


@triton.jit
def _load_shift(log_probs, old_log_probs, loss_mask, offset, inside, whole, max_shift, log_c):
    """Δ_t (Eq. 3), x_t = M_t Δ_t (Eq. 5), and which tokens are finite, trained, and above c.

    Without old log-probs ``log_probs`` is x itself, and the mask says no more than which tokens count as distance.
    """
    shift = _load(log_probs, offset, inside, whole).to(tl.float32)
    if old_log_probs is not None:
        shift -= _load(old_log_probs, offset, inside, whole).to(tl.float32)
    finite = tl.abs(shift) < float("inf")
    shift = tl.where(finite, tl.minimum(tl.maximum(shift, -max_shift), max_shift), 0.0)
    above_c = shift > log_c
    trained = inside
    if loss_mask is not None:
        trained = inside & (_load(loss_mask, offset, inside, whole) != 0)
    x = shift
    if old_log_probs is not None:
        x = tl.where(above_c, 0.0, tl.where(trained, shift, 0.0))
    return shift, x, finite, trained, above_c


@triton.jit
def _segment_of(offsets, token, low, high):
    """Which of the segments ``low`` to ``high`` holds ``token`` (one or a block): the first that ends behind it."""
    first = token * 0 + low
    last = token * 0 + high
    span = high - low
    while span > 0:
        middle = (first + last) >> 1
        ended = tl.load(offsets + middle + 1) <= token
        first = tl.where(ended, middle + 1, first)
        last = tl.where(ended, last, middle)
        span = span >> 1
    return first


@triton.jit
def _sum_tokens(x, trained, own, log2_decay, OVER_TRAINED: tl.constexpr, BLOCK: tl.constexpr):
    """Future-KL at the first of a block's ``own`` tokens, which come first in it, and the distance across them."""
    if OVER_TRAINED:
        counted = (trained & own).to(tl.int32)
        before = tl.cumsum(counted, 0) - counted
    else:
        counted = own.to(tl.int32)
        before = tl.arange(0, BLOCK)
    decay = tl.exp2(before.to(tl.float32) * log2_decay)
    return tl.sum(tl.where(own, x * decay, 0.0), 0), tl.sum(counted, 0)


@triton.jit
def _sum_later_blocks(
    sums, distances, block, end, log2_decay, OVER_TRAINED: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr
):
    """Future-KL at the first token behind ``block`` of the segment that ends at ``end``, and the distance to there.

    Stops after 256 half-lives, when nothing can be left in float32. The distance then is too short, but no less final.
    """
    later = block + 1
    stop = (end + BLOCK - 1) // BLOCK
    future = tl.full((), 0.0, tl.float32)
    distance = tl.full((), 0.0, tl.float32)
    while (later < stop) & (distance * log2_decay > -256.0):
        index = later + tl.arange(0, TILE)
        inside = index < stop
        if OVER_TRAINED:
            across = tl.load(distances + index, mask=inside, other=0)
            before = tl.cumsum(across, 0) - across
            step = tl.sum(across, 0)
        else:
            before = tl.arange(0, TILE) * BLOCK
            step = TILE * BLOCK
        decay = tl.exp2((distance + before.to(tl.float32)) * log2_decay)
        future += tl.sum(tl.load(sums + index, mask=inside, other=0.0) * decay, 0)
        distance += step
        later += TILE
    if not OVER_TRAINED:
        distance = (end - (block + 1) * BLOCK).to(tl.float32)
    return future, distance


@triton.jit
def _decayed(decay, future):
    """2^decay · future; 0 where nothing carries over, whatever stands there: infinity times 0 would be NaN."""
    return tl.where(decay == float("-inf"), 0.0, tl.exp2(decay) * future)


@triton.jit
def _join(later_decay, later_future, decay, future):
    """Two adjacent spans as one; a span is log2 of the decay across it and the Future-KL at its first token."""
    return decay + later_decay, future + _decayed(decay, later_future)


@triton.jit(do_not_specialize=["tokens", "segments"])
def _sum_blocks(
    log_probs,
    old_log_probs,
    loss_mask,
    offsets,
    sums,
    distances,
    max_shift,
    log_c,
    log2_decay,
    OVER_TRAINED: tl.constexpr,
    BLOCK: tl.constexpr,
    tokens,
    segments,
    advantages=None,
    dual_clipped=None,
):
    """Per block: the Future-KL at its first token from the block alone, and the distance that this spans."""
    block = tl.program_id(0).to(tl.int64)
    start = block * BLOCK
    offset = start + tl.arange(0, BLOCK)
    inside = offset < tokens
    whole = start + BLOCK <= tokens
    _, x, _, trained, above_c = _load_shift(
        log_probs, old_log_probs, loss_mask, offset, inside, whole, max_shift, log_c
    )
    first = _segment_of(offsets, start, 0, segments - 1)
    own = offset < tl.load(offsets + first + 1)
    future, distance = _sum_tokens(x, trained, own, log2_decay, OVER_TRAINED, BLOCK)
    tl.store(sums + block, future)
    if OVER_TRAINED:
        tl.store(distances + block, distance)

    if advantages is not None:
        suspect = trained & above_c
        clipped = suspect & (tl.load(advantages + offset, mask=suspect, other=0).to(tl.float32) < 0)
        if tl.max(clipped.to(tl.int32), 0) > 0:
            segment = _segment_of(offsets, tl.minimum(offset, tokens - 1), first, segments - 1)
            tl.atomic_add(dual_clipped + segment, 1, mask=clipped, sem="relaxed")


@triton.jit
def _sum_heads(
    log_probs,
    old_log_probs,
    loss_mask,
    offsets,
    sums,
    distances,
    max_shift,
    log_c,
    log2_decay,
    OVER_TRAINED: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    heads,
):
    """Per segment: the Future-KL at its first token, 0 for an empty one."""
    segment = tl.program_id(0)
    start = tl.load(offsets + segment)
    end = tl.load(offsets + segment + 1)
    block = start // BLOCK
    offset = start + tl.arange(0, BLOCK)
    own = offset < tl.minimum(end, (block + 1) * BLOCK)
    _, x, _, trained, _ = _load_shift(log_probs, old_log_probs, loss_mask, offset, own, False, max_shift, log_c)
    future, distance = _sum_tokens(x, trained, own, log2_decay, OVER_TRAINED, BLOCK)
    later, _ = _sum_later_blocks(sums, distances, block, end, log2_decay, OVER_TRAINED, BLOCK, TILE)
    tl.store(heads + segment, future + tl.exp2(distance.to(tl.float32) * log2_decay) * later)


@triton.jit(do_not_specialize=["tokens", "segments", "max_dual_clipped"])
def _weigh(
    log_probs,
    old_log_probs,
    loss_mask,
    offsets,
    sums,
    distances,
    max_shift,
    log_c,
    log2_decay,
    OVER_TRAINED: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    tokens,
    segments,
    future_kl,
    behind=None,
    advantages=None,
    dual_clipped=None,
    max_dual_clipped=None,
    low=None,
    high=None,
    log_safety=None,
    safety_low=None,
    safety_high=None,
    weights=None,
    influence_weight=None,
    influence_deviation=None,
    clip_high_frac=None,
    clip_low_frac=None,
    safety_capped_frac=None,
    excluded_frac=None,
    dropped_frac=None,
    nonfinite_frac=None,
    neg_ratio_2_3=None,
    neg_ratio_3_4=None,
    neg_ratio_4_c=None,
):
    """Per token: Future-KL, and unless ``weights`` is None the weight and the metrics that are not None."""
    block = tl.program_id(0).to(tl.int64)
    start = block * BLOCK
    offset = start + tl.arange(0, BLOCK)
    inside = offset < tokens
    whole = start + BLOCK <= tokens
    shift, x, finite, trained, above_c = _load_shift(
        log_probs, old_log_probs, loss_mask, offset, inside, whole, max_shift, log_c
    )

    final = tl.minimum(start + BLOCK, tokens) - 1
    first = _segment_of(offsets, start, 0, segments - 1)
    last = _segment_of(offsets, final, first, segments - 1)
    segment = _segment_of(offsets, tl.minimum(offset, final), first, last)
    ends = offset + 1 == tl.load(offsets + segment + 1)

    end = tl.load(offsets + last + 1)
    later, distance = _sum_later_blocks(sums, distances, block, end, log2_decay, OVER_TRAINED, BLOCK, TILE)
    decay = tl.zeros([BLOCK], tl.float32) + log2_decay
    if OVER_TRAINED:
        decay = tl.where(trained, decay, 0.0)
    if behind is not None:
        # What follows a segment elsewhere enters at its last token: here, or in a later block that is summed already.
        x += tl.where(ends, tl.exp2(decay) * tl.load(behind + segment, mask=ends, other=0.0), 0.0)
        later += tl.where(end > start + BLOCK, tl.exp2(distance * log2_decay) * tl.load(behind + last), 0.0)
    decay = tl.where(ends, float("-inf"), decay)
    decay, future = tl.associative_scan((decay, x), 0, _join, reverse=True)
    future += _decayed(decay, later)
    _store(future_kl, offset, future, inside, whole)

    if weights is not None:
        negative = _load(advantages, offset, inside, whole).to(tl.float32) < 0
        unclipped = tl.exp(future)
        influence = tl.minimum(tl.maximum(unclipped, low), high)
        capped = negative & (shift > log_safety)
        influence = tl.where(capped, tl.minimum(tl.maximum(influence, safety_low), safety_high), influence)
        dropped = tl.load(dual_clipped + segment) > max_dual_clipped
        _store(weights, offset, tl.where(dropped, 0.0, influence), inside, whole)

        if influence_weight is not None:
            _store(influence_weight, offset, influence, inside, whole)
        if influence_deviation is not None:
            _store(influence_deviation, offset, tl.abs(influence - 1.0), inside, whole)
        if clip_high_frac is not None:
            _store(clip_high_frac, offset, (influence >= high) & (unclipped > high), inside, whole)
        if clip_low_frac is not None:
            _store(clip_low_frac, offset, (influence <= low) & ((unclipped < low) | capped), inside, whole)
        if safety_capped_frac is not None:
            _store(safety_capped_frac, offset, capped, inside, whole)
        if excluded_frac is not None:
            _store(excluded_frac, offset, above_c, inside, whole)
        if dropped_frac is not None:
            _store(dropped_frac, offset, dropped, inside, whole)
        if nonfinite_frac is not None:
            _store(nonfinite_frac, offset, finite == 0, inside, whole)
        if neg_ratio_2_3 is not None:
            _store(neg_ratio_2_3, offset, negative & (shift >= _LOG_2) & (shift < _LOG_3), inside, whole)
        if neg_ratio_3_4 is not None:
            _store(neg_ratio_3_4, offset, negative & (shift >= _LOG_3) & (shift < _LOG_4), inside, whole)
        if neg_ratio_4_c is not None:
            _store(neg_ratio_4_c, offset, negative & (shift >= _LOG_4) & (shift < log_c), inside, whole)


INTERPRETED = not isinstance(_weigh, triton.JITFunction)  # TRITON_INTERPRET=1 stood in the environment


def kernel_future_kl(shift: Tensor, lengths: Tensor, decay_rate: float, decay_mask: Tensor | None) -> Tensor:
    """F [T] in float32 of a shift [T], T ≥ 1; ``lengths`` is an int64 CPU tensor [B]. Non-finite entries count as 0."""
    future = shift.new_empty(shift.shape, dtype=torch.float32)
    with torch.cuda.device_of(shift):
        grid, batch, size = _cut(
            shift, None, decay_mask, lengths, decay_rate, decay_mask is not None, max_shift=math.inf, log_c=math.inf
        )
        _sum_blocks[grid](**batch, **size)
        _weigh[grid](**batch, **size, TILE=TILE, future_kl=future)
    return future


def kernel_weights(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    lengths: Tensor,
    config: FipoConfig,
    cp: ContextParallel | None,
    chunks: Tensor | None,
    metrics: Collection[str],
    max_shift: float,
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Weights [T], Future-KL [T], keep [B] and the metrics: ``fipo_weights`` on arguments that it has checked, T ≥ 1.

    ``lengths`` is an int64 CPU tensor [B], ``chunks`` what ``cp.check`` returned. All floats returned are float32.
    """
    tokens = log_probs.numel()
    over_trained = config.decay_over == "trained_tokens"
    c, safety, limit = config.dual_clip_c, config.safety_thresh, config.max_dual_clipped_tokens
    limit = LARGEST_INTEGER if limit is None else int(limit)
    low, high = map(float, config.influence_bounds)
    segments = lengths if cp is None else cp.segments(chunks)

    with torch.cuda.device_of(log_probs):
        grid, batch, size = _cut(
            log_probs,
            old_log_probs,
            loss_mask,
            segments,
            config.decay_rate,
            over_trained,
            max_shift=max_shift,
            log_c=math.inf if c is None else math.log(c),
        )
        advantages = advantages.contiguous()
        counts = batch["sums"].new_zeros(segments.numel(), dtype=torch.int32)
        _sum_blocks[grid](**batch, **size, advantages=advantages, dual_clipped=counts)
        behind, dual_clipped = None, counts
        if cp is not None:
            heads = batch["sums"].new_zeros(segments.numel())
            _sum_heads[(segments.numel(),)](**batch, TILE=TILE, heads=heads)
            behind, dual_clipped = cp.exchange(
                heads, counts.view(-1, 2).sum(1), chunks, config.decay_rate, over_trained
            )
            counts = dual_clipped.to(torch.int32).repeat_interleave(2)

        weights, future = (torch.empty_like(batch["log_probs"], dtype=torch.float32) for _ in range(2))
        # Rows of whole cache lines: each starts aligned, whatever the number of tokens.
        own_rows = [name for name in metrics if name != "future_kl"]
        rows = weights.new_empty(len(own_rows), triton.cdiv(tokens, 32) * 32)[:, :tokens].unbind()
        values = dict(zip(own_rows, rows, strict=True))
        _weigh[grid](
            **batch,
            **size,
            TILE=TILE,
            future_kl=future,
            behind=behind,
            advantages=advantages,
            dual_clipped=counts,
            max_dual_clipped=limit,
            low=low,
            high=high,
            log_safety=math.inf if safety is None else math.log(safety),
            safety_low=SAFETY_BOUNDS[0],
            safety_high=SAFETY_BOUNDS[1],
            weights=weights,
            **values,
        )
        return (
            weights,
            future,
            dual_clipped <= limit,
            {name: values[name] if name in values else future.clone() for name in metrics},
        )


def _cut(log_probs, old_log_probs, loss_mask, lengths, decay_rate, over_trained, max_shift, log_c):
    """The launch grid, the arguments that all launches share, and those that all but ``_sum_heads`` share."""
    grid = (triton.cdiv(log_probs.numel(), BLOCK),)
    batch = dict(
        log_probs=log_probs.contiguous(),
        old_log_probs=None if old_log_probs is None else old_log_probs.contiguous(),
        loss_mask=None if loss_mask is None else loss_mask.contiguous(),
        offsets=to_device(torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]), log_probs.device),
        sums=log_probs.new_empty(grid, dtype=torch.float32),
        distances=log_probs.new_empty(grid, dtype=torch.int32) if over_trained else None,
        max_shift=max_shift,
        log_c=log_c,
        log2_decay=log2_decay_of(decay_rate),
        OVER_TRAINED=over_trained,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
    return grid, batch, dict(tokens=log_probs.numel(), segments=lengths.numel())
