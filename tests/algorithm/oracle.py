"""Float64 oracles of the objective, token by token, written from the equations and nothing else."""

import math

import numpy as np


def future_kl(shift, lengths, decay_rate, decay_mask=None):
    """F_t = x_t + γ^{d_t} F_{t+1} within each response, in float64; d_t is 1, or decay_mask_t."""
    x = np.asarray(shift, dtype=np.float64)
    counted = np.ones(len(x)) if decay_mask is None else (np.asarray(decay_mask) != 0).astype(np.float64)
    decay = np.exp2(-counted / decay_rate)
    out = np.empty_like(x)
    stop = len(x)
    for n in reversed(lengths):
        carry = 0.0
        for t in range(stop - 1, stop - n - 1, -1):
            carry = x[t] + (decay[t] * carry if t < stop - 1 else 0.0)
            out[t] = carry
        stop -= n
    assert stop == 0
    return out


def weights(log_probs, old_log_probs, advantages, loss_mask, lengths, config):
    """(weights, future_kl, keep) of finite inputs, one response and one token at a time."""
    shift = np.clip(np.asarray(log_probs, np.float64) - np.asarray(old_log_probs, np.float64), -20, 20)
    c = config.dual_clip_c
    x = [s if m and (c is None or s <= math.log(c)) else 0.0 for s, m in zip(shift, loss_mask, strict=True)]
    decay_mask = loss_mask if config.decay_over == "trained_tokens" else None
    future = future_kl(x, lengths, config.decay_rate, decay_mask)
    low, high = config.influence_bounds
    out, keep, start = np.empty_like(future), [], 0
    for n in lengths:
        clipped = 0
        for t in range(start, start + n):
            f = min(max(math.exp(future[t]), low), high)
            ratio = math.exp(shift[t])
            if config.safety_thresh is not None and advantages[t] < 0 and ratio > config.safety_thresh:
                f = min(max(f, 0.8), 1.0)
            clipped += bool(loss_mask[t] and advantages[t] < 0 and c is not None and ratio > c)
            out[t] = f
        limit = config.max_dual_clipped_tokens
        keep.append(limit is None or clipped <= limit)
        if not keep[-1]:
            out[start : start + n] = 0.0
        start += n
    return out, future, np.array(keep, dtype=bool)
