"""Learning-rate factors worked out by hand."""

import pytest

from recipes.stages.optim import Schedule
from trainers.training.schedule import learning_rate_factor


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        (Schedule(name="constant"), [1, 1, 1, 1, 1]),
        (Schedule(name="constant", warmup_steps=2), [0.5, 1, 1, 1, 1]),
        (Schedule(name="linear"), [1, 0.75, 0.5, 0.25, 0]),
        (Schedule(name="linear", warmup_steps=2, min_ratio=0.5), [0.5, 1, 1, 0.75, 0.5]),
        (Schedule(name="cosine"), [1, 0.853553, 0.5, 0.146447, 0]),
        (Schedule(name="cosine", warmup_steps=4, min_ratio=0.1), [0.25, 0.5, 0.75, 1, 1]),
    ],
)
def test_factor_per_step(schedule: Schedule, factors: list[float]) -> None:
    found = [learning_rate_factor(schedule, step, len(factors)) for step in range(len(factors))]
    assert found == pytest.approx(factors, abs=1e-6)


@pytest.mark.parametrize(
    ("ratio", "steps", "warmup"), [(0.1, 30, 3), (0.1, 31, 4), (0.5, 1, 0), (0.9, 2, 1), (0.0, 9, 0)]
)
def test_a_share_of_the_steps_warms_up(ratio: float, steps: int, warmup: int) -> None:
    by_share, by_steps = Schedule(warmup_ratio=ratio), Schedule(warmup_steps=warmup)
    assert by_share.warmup(steps) == warmup
    for step in range(steps):
        assert learning_rate_factor(by_share, step, steps) == learning_rate_factor(by_steps, step, steps)


def test_one_of_steps_and_share() -> None:
    with pytest.raises(ValueError, match="not both"):
        Schedule(warmup_steps=2, warmup_ratio=0.5)
