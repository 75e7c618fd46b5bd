"""Intervals of what an evaluation measures, and tests of differences (pure)."""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Z_95 = 1.959963984540054
DRAWS = 4000
"""Of a bootstrap; its seed is fixed, so that equal values have equal intervals."""
DRAWN_AT_ONCE = 1_000_000

Floats = NDArray[np.float64]


class Difference(NamedTuple):
    """What each case has more the second time."""

    mean: float
    low: float
    high: float
    """The 95 % interval of the mean."""
    p: float
    """Two-sided, of no difference."""


def wilson_interval(rate: float, trials: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson score interval of a share seen in `trials` trials."""
    spread = z * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    centre = rate + z * z / (2 * trials)
    scale = 1 + z * z / trials
    low, high = (centre - spread) / scale, (centre + spread) / scale
    return max(0.0, min(rate, low)), min(1.0, max(rate, high))


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean of some values with its 95 % interval: Wilson's where each is 0 or 1, else by bootstrap."""
    mean = math.fsum(values) / len(values)
    if is_binary(values):
        return mean, *wilson_interval(mean, len(values))
    return mean, *bootstrap_interval(values, resampled_means(values))


def paired(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Compare two values of each case.

    Where all are 0 or 1: Tango's score interval, which is wide for few cases also where none differs, and McNemar's
    exact test (1947). Else both by paired bootstrap, whose smallest p-value is 2 / (DRAWS + 1).
    """
    differences = [b - a for a, b in zip(first, second, strict=True)]
    mean = math.fsum(differences) / len(differences)
    if is_binary(first) and is_binary(second):
        gained, lost = sum(value > 0 for value in differences), sum(value < 0 for value in differences)
        low, high = tango_interval(gained, lost, len(differences))
        return Difference(mean, low, high, mcnemar(gained, lost))
    if not any(differences):
        return Difference(0.0, 0.0, 0.0, 1.0)
    means = resampled_means(differences)
    tail = min(int((means <= 0).sum()), int((means >= 0).sum()))
    low, high = bootstrap_interval(differences, means)
    return Difference(mean, low, high, min(1.0, 2 * (tail + 1) / (DRAWS + 1)))


def is_binary(values: Sequence[float]) -> bool:
    """Whether each value is 0 or 1."""
    return all(value in (0.0, 1.0) for value in values)


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided p-value of McNemar's exact test: cases that changed do so either way equally often."""
    changed = gained + lost
    return min(1.0, 2 * sum(math.comb(changed, k) for k in range(min(gained, lost) + 1)) / 2**changed)


def tango_interval(gained: int, lost: int, count: int, z: float = Z_95) -> tuple[float, float]:
    """Score interval of the difference of two paired shares (Tango 1998, equation 13), by bisection."""

    def score(difference: float) -> float:
        """Falls in the difference."""
        b = (2 * count - gained + lost) * difference - gained - lost
        only_lost = (math.sqrt(b * b + 8 * count * lost * difference * (1 - difference)) - b) / (4 * count)
        variance = count * (2 * only_lost + difference * (1 - difference))
        return (gained - lost - count * difference) / math.sqrt(variance) if variance > 0 else 0.0

    def crossing(wanted: float, low: float, high: float) -> float:
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if score(middle) > wanted else (low, middle)
        return (low + high) / 2

    seen = (gained - lost) / count
    return crossing(z, -1.0, seen), crossing(-z, seen, 1.0)


def resampled_means(values: Sequence[float]) -> Floats:
    """Means of DRAWS samples of the values, drawn with replacement."""
    there, count = np.asarray(values, dtype=np.float64), len(values)
    draws, at_once = np.random.default_rng(0), max(1, DRAWN_AT_ONCE // count)
    sizes = [min(at_once, DRAWS - start) for start in range(0, DRAWS, at_once)]
    return np.concatenate([there[draws.integers(count, size=(size, count))].mean(axis=1) for size in sizes])


def bootstrap_interval(values: Sequence[float], means: Floats) -> tuple[float, float]:
    """The 95 % interval of a mean by its resampled ones, corrected for bias and skewness (BCa, Efron 1987)."""
    there = np.asarray(values, dtype=np.float64)
    away = there - there.mean()
    squares = float((away**2).sum())
    if squares == 0:
        return float(there[0]), float(there[0])
    normal = NormalDist()
    below = float((means < there.mean()).mean() + (means == there.mean()).mean() / 2)
    bias = normal.inv_cdf(min(max(below, 1 / len(means)), 1 - 1 / len(means)))
    skewness = float((away**3).sum()) / (6 * squares**1.5)

    def bound(z: float) -> float:
        return float(np.quantile(means, normal.cdf(bias + (bias + z) / (1 - skewness * (bias + z)))))

    return bound(-Z_95), bound(Z_95)
