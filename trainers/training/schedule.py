"""Learning rate as a pure function of the step."""

import math

from recipes.stages.optim import Schedule


def learning_rate_factor(schedule: Schedule, step: int, steps_planned: int) -> float:
    """Return the factor of the peak learning rate for step `step` (from 0) of `steps_planned`.

    Warm-up rises from 1 / its steps, so that no step is wasted on a rate of zero; the decay reaches `min_ratio` at
    the last step.
    """
    warmup = schedule.warmup(steps_planned)
    if step < warmup:
        return (step + 1) / warmup
    if schedule.name == "constant":
        return 1.0
    length = max(1, steps_planned - 1 - warmup)
    progress = min(1.0, (step - warmup) / length)
    falling = 1.0 - progress if schedule.name == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return schedule.min_ratio + (1.0 - schedule.min_ratio) * falling
