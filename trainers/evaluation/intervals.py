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


def paired(first: Sequence[float], second: Sequence[float], z: float = Z_95) -> tuple[float, float, float, float]:
    """The mean of what each case has more the second time, its 95 % interval, and a two-sided p-value.

    The test is McNemar's exact one (1947) where every value is 0 or 1, else the normal one of paired differences.
    """
    differences = [b - a for a, b in zip(first, second, strict=True)]
    count = len(differences)
    mean = math.fsum(differences) / count
    error = math.sqrt(math.fsum((value - mean) ** 2 for value in differences) / max(count - 1, 1) / count)
    if all(value in (0.0, 1.0) for value in (*first, *second)):
        changed = sum(value != 0 for value in differences)
        fewer = min(sum(value > 0 for value in differences), sum(value < 0 for value in differences))
        p = min(1.0, 2 * sum(math.comb(changed, k) for k in range(fewer + 1)) / 2**changed)
    else:
        p = math.erfc(abs(mean) / error / math.sqrt(2)) if error else float(mean == 0)
    return mean, mean - z * error, mean + z * error, p
