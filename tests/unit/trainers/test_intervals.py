"""Intervals and paired differences against searches, scipy and formulas."""

import math
from typing import Any

import numpy as np
import pytest

from trainers.evaluation.intervals import mean_interval, paired


def test_differences_of_two_models_on_the_same_rows_by_hand() -> None:
    gain, low, high, p = paired([1, 1, 0, 0, 0, 0, 0, 1], [1, 0, 1, 1, 1, 1, 1, 1])
    assert gain == pytest.approx(0.5)
    assert p == pytest.approx(2 * (1 + 6) / 2**6)  # McNemar: 5 better, 1 worse
    assert (low, high) == by_search(5, 1, 8)
    zero = paired([1] * 5 + [0] * 15, [1] * 5 + [0] * 15)
    most = 1.95996**2 / (20 + 1.95996**2)
    assert zero == (0, pytest.approx(-most, abs=1e-4), pytest.approx(most, abs=1e-4), 1)
    assert paired([0.0, 0.5, 1.5], [0.0, 0.5, 1.5]) == (0, 0, 0, 1)


def by_search(gained: int, lost: int, count: int) -> Any:
    """Differences that a score test at 5 % does not refuse, by a search through both."""
    kept = []
    for difference in np.linspace(-0.999, 0.999, 1999):
        only_lost = np.linspace(max(0, -difference) + 1e-6, (1 - difference) / 2 - 1e-6, 4000)
        same = np.log(1 - 2 * only_lost - difference)
        likelihood = gained * np.log(only_lost + difference) + lost * np.log(only_lost) + (count - gained - lost) * same
        best = only_lost[likelihood.argmax()]
        error = math.sqrt(count * (2 * best + difference * (1 - difference)))
        if abs(gained - lost - count * difference) <= 1.95996 * error:
            kept.append(difference)
    return pytest.approx((kept[0], kept[-1]), abs=0.002)


def test_intervals_of_real_values_are_those_of_a_bootstrap() -> None:
    """Of 40 skewed values as scipy's BCa has it, of many values as a normal one; of paired ones by what rows gain."""
    values = np.random.default_rng(3).exponential(size=40).tolist()
    mean, low, high = mean_interval(values)
    stats: Any = pytest.importorskip("scipy.stats")
    wanted = stats.bootstrap((values,), np.mean, method="BCa", n_resamples=9999, rng=1).confidence_interval
    error = np.std(values, ddof=1) / math.sqrt(40)
    assert (low, high) == (pytest.approx(wanted.low, abs=error / 10), pytest.approx(wanted.high, abs=error / 10))
    assert high - mean > 1.1 * (mean - low)
    assert mean_interval(values) == (mean, low, high)
    many = np.random.default_rng(4).normal(0.5, 0.1, size=3000).tolist()
    spread = 1.95996 * np.std(many) / math.sqrt(3000)
    assert mean_interval(many) == pytest.approx(
        (np.mean(many), np.mean(many) - spread, np.mean(many) + spread), abs=3e-4
    )
    assert mean_interval([0.3] * 5) == (pytest.approx(0.3), 0.3, 0.3)
    more = [value + 0.4 * (place % 2) for place, value in enumerate(values)]
    gain = paired(values, more)
    assert (gain.mean, gain.low < 0.2 < gain.high, gain.p < 0.01) == (pytest.approx(0.2), True, True)
    noise = paired(values, values[1:] + values[:1])
    assert noise.low < 0 < noise.high
    assert noise.p > 0.3
