"""avg@k, cons@k and pass@k with bootstrap intervals, for slime's ``--custom-eval-rollout-log-function-path``.

The three estimators work on plain numbers and lists; the hook at the end of the file reads slime's evaluation samples
and logs beside slime's own ``eval/`` metrics.
"""

from __future__ import annotations

import functools
import logging
from argparse import Namespace
from collections import defaultdict
from collections.abc import Sequence
from math import comb

import numpy as np

from . import tracking
from .filters import accuracy_of, is_aborted
from .integer_answer import read_integer
from .reward import NO_ANSWER
from .rollout_metrics import verdict_shares

RESAMPLES = 2000

logger = logging.getLogger(__name__)


def avg_at_k(correct: Sequence[float]) -> float:
    """Mean accuracy over a problem's k samples."""
    if not correct:
        raise ValueError("avg@k needs at least one sample")
    return float(np.mean(correct))


def cons_at_k(answers: Sequence[str | None], correct: Sequence[float]) -> float:
    """Accuracy of the majority vote over a problem's k samples.

    Samples without an answer do not vote; if none votes, the result is 0. Of answers tied for the most votes one is
    drawn, so the result is the share of right ones among them.

    Args:
        answers: k answers, equal texts where the verifier means the same answer.
        correct: whether each of them is right.
    """
    if len(answers) != len(correct) or not answers:
        raise ValueError(
            f"cons@k needs as many answers as verdicts and at least one, got {len(answers)}, {len(correct)}"
        )
    votes = defaultdict(list)
    for answer, is_right in zip(answers, correct, strict=True):
        if answer not in (None, "", NO_ANSWER):
            votes[answer].append(float(is_right))
    if not votes:
        return 0.0
    most = max(map(len, votes.values()))
    return float(np.mean([np.mean(verdicts) for verdicts in votes.values() if len(verdicts) == most]))


def pass_at_k(correct: Sequence[float], k: int) -> float:
    """Probability that at least one of k samples drawn without replacement is right: 1 − C(n−c, k) / C(n, k).

    The unbiased estimator of Chen et al. (arXiv:2107.03374, Eq. 1).

    Raises:
        ValueError: k is not between 1 and the number of samples n; more draws than samples have no unbiased estimate.
    """
    n, c = len(correct), sum(map(bool, correct))
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} cannot be estimated from {n} samples; sample at least k times per problem")
    return 1.0 - comb(n - c, k) / comb(n, k)


def bootstrap_interval(
    values: Sequence[float], confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over problems.

    Problems are resampled, not samples: with 30 of them, which problems a benchmark happens to hold is the larger part
    of the uncertainty.

    Args:
        values: one value per problem.
        seed: the same values give the same interval.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.size == 0:
        raise ValueError("a bootstrap interval needs at least one problem")
    draws = np.random.default_rng(seed).integers(values.size, size=(resamples, values.size))
    tail = (1.0 - confidence) / 2
    low, high = np.quantile(values[draws].mean(axis=1), [tail, 1.0 - tail])
    return float(low), float(high)


def evaluate(problems: Sequence[tuple[Sequence[str | None], Sequence[float]]]) -> dict[str, float]:
    """avg@k, cons@k and pass@k over a benchmark, each with its 95% interval as ``…_low`` and ``…_high``.

    Args:
        problems: per problem its answers and verdicts. avg@ and cons@ carry the largest number of samples in their
            names; pass@ is given for powers of two from 2 up to the smallest number, and for that number.
    """
    counts = [len(correct) for _, correct in problems]
    if not counts or min(counts) == 0:
        raise ValueError("an evaluation needs at least one problem, and a sample of each")
    values = {
        f"avg@{max(counts)}": [avg_at_k(correct) for _, correct in problems],
        f"cons@{max(counts)}": [cons_at_k(answers, correct) for answers, correct in problems],
    }
    ks = {2**i for i in range(1, min(counts).bit_length()) if 2**i <= min(counts)} | ({min(counts)} - {1})
    for k in sorted(ks):
        values[f"pass@{k}"] = [pass_at_k(correct, k) for _, correct in problems]

    metrics = {}
    for name, per_problem in values.items():
        metrics[name] = float(np.mean(per_problem))
        metrics[f"{name}_low"], metrics[f"{name}_high"] = bootstrap_interval(per_problem)
    return metrics


def log_eval_rollout_data(rollout_id: int, args: Namespace, data: dict, extra_metrics: dict | None = None) -> bool:
    """Log ``eval/NAME/avg@k`` and the others to slime's trackers; slime's own evaluation metrics follow.

    Args:
        data: per benchmark a dictionary whose ``samples`` are in slime's order, k consecutive indices per problem,
            and carry reward dictionaries with ``acc`` and ``pred``. Aborted samples are left out, with a warning. A
            benchmark whose rewards have no ``acc`` is left out, with one warning: slime's own metrics of it follow
            anyway.

    Returns:
        False, which tells slime to go on with its own logging.
    """
    samples_per_problem = {
        dataset.name: dataset.n_samples_per_eval_prompt for dataset in getattr(args, "eval_datasets", None) or []
    }
    log_dict = {}
    for name, benchmark in data.items():
        samples = [sample for sample in benchmark.get("samples") or () if not is_aborted(sample)]
        aborted = len(benchmark.get("samples") or ()) - len(samples)
        if aborted:
            logger.warning(
                "%d responses of %s were aborted by the engine and have no reward; its metrics leave them out",
                aborted,
                name,
            )
        if not samples:
            continue
        k = samples_per_problem.get(name) or args.n_samples_per_eval_prompt
        try:
            problems = _by_problem(samples, k)
        except (ValueError, TypeError):
            _warn_of_no_accuracy(name)
            continue
        metrics = {**evaluate(problems), **verdict_shares(samples)}
        log_dict.update({f"eval/{name}/{metric}": value for metric, value in metrics.items()})
    if log_dict:
        tracking.log(args, rollout_id, log_dict, step_key="eval/step")
    return False


@functools.cache  # once per run, not at every evaluation
def _warn_of_no_accuracy(benchmark: str) -> None:
    logger.warning(
        "the rewards of %s have no 'acc', so avg@k, cons@k and pass@k leave it out; use"
        " --custom-rm-path slime_fipo.recipes.reward.dapo_math_reward, or a reward that returns it",
        benchmark,
    )


def _by_problem(samples: list, samples_per_problem: int) -> list[tuple[tuple, tuple]]:
    """Answers and verdicts per problem; of one rollout's several samples (fan-out) the last holds the answer."""
    problems = defaultdict(dict)
    for sample in samples:
        accuracy = accuracy_of(sample)
        answer = _canonical_answer(sample.reward.get("pred"))
        problems[sample.index // samples_per_problem][sample.index] = (answer, accuracy)
    return [tuple(zip(*verdicts.values(), strict=True)) for verdicts in problems.values()]


def _canonical_answer(answer) -> str | None:
    """What an answer votes as: an integer in canonical digits, other text as it is, other objects as written."""
    if answer is None:
        return None
    text = answer if isinstance(answer, str) else repr(answer)
    return read_integer(text) or text.strip()
