"""How noise in the shift shows in Future-KL and in the weights: ``python -m benchmarks.noise``.

At a rollout's first step the policy has not moved, so against the rollout engine's log-probs the shift is what the two
engines disagree by. Here it is simulated as independent Gaussian noise, and printed as the Markdown tables of
``docs/slime.md``.
"""

import math

import torch

from slime_fipo import FipoConfig, fipo_weights

SIGMAS = (0.005, 0.01, 0.015, 0.02, 0.03, 0.05)
DECAY_RATES = (8, 16, 32, 64, 128, 256)
LENGTHS = [8192] * 32


def simulate(sigma: float, decay_rate: float) -> tuple[float, float, float]:
    """Standard deviation and mean size of Future-KL, and the share of weights outside [0.8, 1.2]."""
    shift = sigma * torch.randn(sum(LENGTHS), generator=torch.Generator().manual_seed(0))
    ones = torch.ones_like(shift)
    config = FipoConfig(decay_rate=decay_rate)
    result = fipo_weights(shift, torch.zeros_like(shift), ones, ones, LENGTHS, config)
    clipped = result.metrics["clip_high_frac"] + result.metrics["clip_low_frac"]
    return float(result.future_kl.std()), float(result.future_kl.abs().mean()), float(clipped.mean())


def main() -> None:
    results = {(s, t): simulate(s, t) for s in SIGMAS for t in DECAY_RATES}
    header = "| σ (mean abs. difference) | " + " | ".join(f"τ = {t}" for t in DECAY_RATES) + " |"
    rule = "|" + " --- |" * (1 + len(DECAY_RATES))
    for title, index, show in (
        ("Mean |F| (`fipo/mismatch_future_kl_abs`)", 1, "{:.3f}"),
        ("Share of weights clipped to [0.8, 1.2] (`fipo/mismatch_clip_frac`)", 2, "{:.0%}"),
    ):
        print(f"{title}\n\n{header}\n{rule}")
        for sigma in SIGMAS:
            cells = (show.format(results[sigma, t][index]) for t in DECAY_RATES)
            print(f"| {sigma} ({sigma * math.sqrt(2 / math.pi):.3f}) | " + " | ".join(cells) + " |")
        print()
    worst = max(abs(results[s, t][0] / (s / math.sqrt(1 - 2 ** (-2 / t))) - 1) for s, t in results)
    print(f"The standard deviation of F is σ/√(1−γ²) within {worst:.1%}.")


if __name__ == "__main__":
    main()
