"""Comparing what two models wrote to the same prompts: win rate with its interval, variety, length."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from trainers.evaluation.intervals import Z_95, wilson_interval


@dataclass(frozen=True)
class WinRate:
    """Share of comparisons won, ties counted half, with the Wilson score interval."""

    rate: float
    low: float
    high: float
    wins: int
    ties: int
    comparisons: int


def win_rate(scores: Sequence[float], rival_scores: Sequence[float], z: float = Z_95) -> WinRate:
    """How often the first scores beat the second, prompt by prompt (Wilson 1927 for the interval)."""
    if len(scores) != len(rival_scores) or not scores:
        raise ValueError(
            f"need as many scores as rival scores, at least one; found {len(scores)} and {len(rival_scores)}"
        )
    wins = sum(a > b for a, b in zip(scores, rival_scores, strict=True))
    ties = sum(a == b for a, b in zip(scores, rival_scores, strict=True))
    rate = (wins + 0.5 * ties) / len(scores)
    low, high = wilson_interval(rate, len(scores), z)
    return WinRate(rate=rate, low=low, high=high, wins=wins, ties=ties, comparisons=len(scores))


def distinct_n(responses: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams over all n-grams of all responses (Li et al. 2016); 0 if there are none."""
    grams = [tuple(response[i : i + n]) for response in responses for i in range(len(response) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repeated_share(responses: Sequence[Sequence[int]], n: int = 3) -> float:
    """Share of n-grams that stood in the same response before: 0 for none, near 1 for a loop."""
    total = repeated = 0
    for response in responses:
        grams = [tuple(response[i : i + n]) for i in range(len(response) - n + 1)]
        total += len(grams)
        repeated += len(grams) - len(set(grams))
    return repeated / total if total else 0.0


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation with 1/N."""
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))


def correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's correlation; 0 where either side is constant."""
    mean_x, std_x = mean_and_std(x)
    mean_y, std_y = mean_and_std(y)
    if std_x == 0 or std_y == 0:
        return 0.0
    covariance = math.fsum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / len(x)
    return covariance / (std_x * std_y)
