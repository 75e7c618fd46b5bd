"""Intervals of what an evaluation measures, and tests of differences (pure)."""

import math
from collections.abc import Sequence

Z_95 = 1.959963984540054


def wilson_interval(rate: float, trials: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson score interval of a share seen in `trials` trials."""
    spread = z * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    centre = rate + z * z / (2 * trials)
    scale = 1 + z * z / trials
    low, high = (centre - spread) / scale, (centre + spread) / scale
    return max(0.0, min(rate, low)), min(1.0, max(rate, high))


def mean_interval(values: Sequence[float], z: float = Z_95) -> tuple[float, float, float]:
    """The mean of some values with its 95 % interval: Wilson's where each is 0 or 1, else the normal one of a mean."""
    count = len(values)
    mean = math.fsum(values) / count
    if all(value in (0.0, 1.0) for value in values):
        return mean, *wilson_interval(mean, count, z)
    variance = math.fsum((value - mean) ** 2 for value in values) / max(count - 1, 1)
    spread = z * math.sqrt(variance / count)
    return mean, mean - spread, mean + spread


def mcnemar(first: Sequence[float], second: Sequence[float]) -> float:
    """The exact two-sided p-value of McNemar's test (1947) on the same cases, each right (1) or wrong (0)."""
    gained = sum(a < b for a, b in zip(first, second, strict=True))
    lost = sum(a > b for a, b in zip(first, second, strict=True))
    count, fewer = gained + lost, min(gained, lost)
    tail = sum(math.comb(count, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**count)
