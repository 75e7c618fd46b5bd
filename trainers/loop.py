"""The one training loop: time, batches, skipping, saving, evaluating, stopping; objectives and sources know the rest."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor

from trainers.engine.protocol import Engine
from trainers.objectives.protocol import Objective


@dataclass(frozen=True)
class SourceState:
    """What a source needs to go on: JSON values, and tensors that are equal on every rank."""

    values: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


class BatchSource(Protocol):
    """Gives the micro-batches of each step; a step is numbered from 0, `steps_done` counts."""

    @property
    def steps_planned(self) -> int:
        """Steps of a run to its end."""

    def micro_batches(self, step: int) -> Sequence[Any]:
        """Return this rank's micro-batches, equally many on every rank; each has `sample_ids`. May run collectives."""

    def can_save(self, steps_done: int) -> bool:
        """Tell whether the state after `steps_done` steps can be resumed from."""

    def after_step(self, steps_done: int, metrics: Mapping[str, float]) -> str | None:
        """Take the step's global metrics; return the name of a stop rule (equal on all ranks) to end here."""

    def state(self) -> SourceState:
        """Give the state to save; called where `can_save` is True."""

    def load_state(self, state: SourceState) -> None:
        """Take over a saved state."""


class Observer(Protocol):
    """Hears of progress on one rank; never collective."""

    def phase(self, name: str, **progress: float) -> None:
        """Hear what happens now: start, train, evaluate, save, ... with step, steps_planned where known."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Hear the global metrics after `step` steps."""

    def stop_requested(self) -> bool:
        """Tell whether this rank was asked to save and leave (SIGTERM, `stop`)."""


@dataclass(frozen=True)
class LoopState:
    """What the loop itself saves beside the engine and the source."""

    steps_done: int = 0
    skipped_steps: int = 0
    samples: int = 0
    weight: float = 0.0


class Checkpoint(Protocol):
    """Writes and reads training state; collective."""

    def save(self, engine: Engine, loop: LoopState, source: SourceState) -> None:
        """Commit a resumable state."""

    def restore(self, engine: Engine) -> tuple[LoopState, SourceState] | None:
        """Load the newest committed state into the engine; None: there is none."""


@dataclass(frozen=True)
class Cadence:
    """How often things happen, in steps."""

    save_every: int
    evaluate_every: int
    max_skipped_steps: int = 3


@dataclass(frozen=True)
class Outcome:
    """How a training ended; a preempted one raises `Preempted` instead."""

    state: Literal["completed", "stopped_by"]
    rule: str | None
    steps_done: int
    steps_planned: int
    skipped_steps: int
    evaluation: dict[str, float] = field(default_factory=dict)
    last_metrics: dict[str, float] = field(default_factory=dict)


LearningRates = Callable[[int], Mapping[str, float]]
"""Learning rate of each parameter group at a step, from 0."""

Evaluate = Callable[[], Mapping[str, float]]
"""Held-out metrics, equal on all ranks; collective."""


def train(
    engine: Engine,
    objective: Objective,
    source: BatchSource,
    *,
    learning_rates: LearningRates,
    cadence: Cadence,
    checkpoint: Checkpoint,
    evaluate: Evaluate | None,
    observer: Observer,
    seed: int,
) -> Outcome:
    """Train to the end of the source or to a stop rule, resuming from the newest state; collective."""
    raise NotImplementedError
