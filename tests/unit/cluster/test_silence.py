"""Silence of workers and of ranks that train, by hand-made clocks."""

import pytest

from cluster.silence import Answers, Pace


def test_silence_counts_from_the_last_answer_and_not_while_the_driver_was_stopped() -> None:
    answers = Answers([0, 1], 100.0)
    for at in (100.5, 101.0, 101.5):
        answers.tick(at)
    answers.heard(0)
    answers.tick(102.0)
    assert (answers.silent_s(0), answers.silent_s(1)) == (0.5, 2.0)
    answers.tick(702.0)
    assert (answers.silent_s(0), answers.silent_s(1)) == (2.5, 4.0)


@pytest.mark.parametrize(("step_s", "limit_s"), [(0.5, 30.0), (7.0, 70.0)])
def test_the_limit_is_ten_usual_steps_or_the_least(step_s: float, limit_s: float) -> None:
    """The first beat has no pause before it; a slow step, and what lies between two phases, do not move it."""
    pace = Pace()
    at = 0.0
    for number in range(6):
        assert pace.limit_s(30.0) == float("inf"), number
        at += step_s
        for rank in (0, 1) if number == 5 else (0,):
            pace.heard(rank, "train", at)
    pace.heard(0, "save", at + 500)
    pace.heard(0, "train", at + 1000)
    pace.heard(0, "train", at + 1900)
    assert pace.limit_s(30.0) == limit_s


def test_no_limit_is_learnt_from_other_phases() -> None:
    pace = Pace()
    for at in range(100):
        pace.heard(0, "data", float(at))
    assert pace.limit_s(30.0) == float("inf")
