"""What was measured on the way, and how a training ended."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from trainers.data.mixture import Draw


@dataclass(frozen=True)
class Evaluation:
    """What was measured on held-out rows at one point of a training; equal on all ranks."""

    scalars: Mapping[str, float] = field(default_factory=dict)
    """By name; they are logged."""
    tables: Mapping[str, Any] = field(default_factory=dict)
    """What is no number: a confusion matrix, examples. Plain JSON; it goes into the artifact's metrics."""
    gate_reasons: tuple[str, ...] = ()
    """Why later stages should not build on the model as it is now; empty passes the gate."""

    def finite(self) -> dict[str, float]:
        """Return the scalars that are numbers."""
        return {name: value for name, value in self.scalars.items() if math.isfinite(value)}


Evaluate = Callable[[], Evaluation]
"""Measures the model on held-out rows; collective."""


@dataclass(frozen=True)
class Outcome:
    """How a training ended; a preempted one raises `Preempted` instead."""

    state: Literal["completed", "stopped_by"]
    rule: str | None
    steps_done: int
    steps_planned: int
    skipped_steps: int
    samples: int
    weight: float
    evaluation: Evaluation = field(default_factory=Evaluation)
    """The last one; empty where nothing was measured."""
    last_metrics: dict[str, float] = field(default_factory=dict)
    drawn: Mapping[str, Draw] = field(default_factory=dict)
    """How much was drawn of each source of a mixture."""

    def ending(self) -> dict[str, Any]:
        """Return what the artifact's manifest says of it."""
        return {
            "state": self.state,
            "rule": self.rule,
            "steps_done": self.steps_done,
            "steps_planned": self.steps_planned,
        }

    def amounts(self) -> dict[str, Any]:
        """Return what every stage reports of its training: its last metrics and how much it took; no durations."""
        drawn = {name: asdict(draw) for name, draw in self.drawn.items()}
        return {
            **({"drawn": drawn} if drawn else {}),
            "train": {name: value for name, value in self.last_metrics.items() if name != "step_s"},
            "samples": self.samples,
            "skipped_steps": self.skipped_steps,
        }
