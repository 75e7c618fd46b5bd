"""Win rate, its interval, variety and correlation, against published or hand-made numbers."""

import pytest

from rlhf.comparison import correlation, distinct_n, mean_and_std, repeated_share, win_rate
from trainers.evaluation.intervals import wilson_interval


def test_wilson_interval_of_a_textbook_case() -> None:
    # 8 of 10 at 95 %: 0.4902 to 0.9433 (Newcombe 1998's method 3 formula)
    low, high = wilson_interval(0.8, 10)
    assert low == pytest.approx(0.4902, abs=1e-4)
    assert high == pytest.approx(0.9433, abs=1e-4)


@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
def test_wilson_interval_stays_within_0_and_1_and_holds_the_rate(rate: float) -> None:
    low, high = wilson_interval(rate, 7)
    assert 0.0 <= low <= rate <= high <= 1.0


def test_ties_count_half() -> None:
    result = win_rate([1.0, 2.0, 0.0, 5.0], [0.0, 2.0, 1.0, 5.0])
    assert (result.rate, result.wins, result.ties, result.comparisons) == (0.5, 1, 2, 4)


def test_win_rate_refuses_unequal_or_empty_lists() -> None:
    for scores, rivals in (([1.0], []), ([], [])):
        with pytest.raises(ValueError, match="as many"):
            win_rate(scores, rivals)


def test_distinct_and_repetition_by_hand() -> None:
    responses = [[1, 2, 1, 2], [1, 2, 3]]
    assert distinct_n(responses, 2) == pytest.approx(3 / 5)
    assert repeated_share(responses, 2) == pytest.approx(1 / 5)
    assert distinct_n([[1]], 2) == 0.0
    assert repeated_share([[7] * 10], 3) == pytest.approx(7 / 8)


def test_moments_and_correlation() -> None:
    assert mean_and_std([1.0, 3.0]) == (2.0, 1.0)
    assert correlation([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]) == pytest.approx(1.0)
    assert correlation([1.0, 1.0], [0.0, 5.0]) == 0.0
