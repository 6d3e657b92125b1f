"use strict";
// FIPO's influence weights in float64, step by step as slime_fipo/algorithm/weights.py computes them (arXiv:2603.19835,
// Eq. 3-7 and Sec. 3.2). Needs nothing; tests compare it with Python.

const MAX_SHIFT = 20; // Eq. 3: log-ratios beyond ±20 nats are clamped
const UNCLIPPED_BOUNDS = [0, 10];
const SAFETY_BOUNDS = [0.8, 1];
const FATE = { CLIPPED_HIGH: 1, CLIPPED_LOW: 2, CAPPED: 4, EXCLUDED: 8, DROPPED: 16, MASKED: 32, NONFINITE: 64 };

/** Lower and upper bound of the influence weight (Eq. 7). */
function influenceBounds(config) {
  if (!config.clip_influence) return UNCLIPPED_BOUNDS;
  return [config.clip_high_only ? 1 : 1 - config.clip_ratio_low, 1 + config.clip_ratio_high];
}

/**
 * Weights of responses that are packed end to end.
 *
 * shift, advantages: [T]; trained: [T], non-zero where a token is trained; offsets: [B + 1], where responses begin, and T;
 * config: FipoConfig's fields; first, last: the range of responses to compute; the other tokens of `out` stay as they are.
 * Returns `out`, or a new { F, f: Float64Array [T]; fate: Uint8Array [T] }. f is after the safety cap and before the
 * sequence filter, whose drops are in fate.
 */
function fipoWeights(shift, advantages, trained, offsets, config, first = 0, last = offsets.length - 1, out = null) {
  out ??= { F: new Float64Array(shift.length), f: new Float64Array(shift.length), fate: new Uint8Array(shift.length) };
  const { F, f, fate } = out;
  const gamma = 2 ** (-1 / config.decay_rate);
  const overTrained = config.decay_over === "trained_tokens";
  const logC = config.dual_clip_c === null ? Infinity : Math.log(config.dual_clip_c);
  const logS = config.safety_thresh === null ? Infinity : Math.log(config.safety_thresh);
  const maxDualClipped = config.max_dual_clipped_tokens ?? Infinity;
  const [low, high] = influenceBounds(config);

  for (let response = first; response < last; response++) {
    const start = offsets[response], stop = offsets[response + 1];
    let future = 0, dualClipped = 0;
    for (let t = stop - 1; t >= start; t--) {
      const raw = shift[t], isTrained = trained[t] !== 0, negative = advantages[t] < 0;
      const finite = raw - raw === 0;
      const delta = finite ? Math.min(MAX_SHIFT, Math.max(-MAX_SHIFT, raw)) : 0;
      const excluded = delta > logC;
      if (!overTrained || isTrained) future *= gamma; // distance from t to t + 1
      if (isTrained && !excluded) future += delta; // M_t Δ_t, Eq. 5-6
      F[t] = future;

      const unclipped = Math.exp(future);
      let weight = unclipped < low ? low : unclipped > high ? high : unclipped;
      const capped = negative && delta > logS;
      if (capped) weight = Math.min(SAFETY_BOUNDS[1], Math.max(SAFETY_BOUNDS[0], weight));
      f[t] = weight;

      let flags = isTrained ? 0 : FATE.MASKED;
      if (weight >= high && unclipped > high) flags |= FATE.CLIPPED_HIGH;
      if (weight <= low && (unclipped < low || capped)) flags |= FATE.CLIPPED_LOW;
      if (capped) flags |= FATE.CAPPED;
      if (excluded) flags |= FATE.EXCLUDED;
      if (!finite) flags |= FATE.NONFINITE;
      fate[t] = flags;
      if (isTrained && negative && excluded) dualClipped++;
    }
    if (dualClipped > maxDualClipped) {
      for (let t = start; t < stop; t++) fate[t] |= FATE.DROPPED;
    }
  }
  return out;
}
