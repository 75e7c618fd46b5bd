"""What training stages share: batches that follow from the step, a batch's division, their way through the loop."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypedDict, TypeVar

from torch import nn

from recipes.errors import StageError, raise_findings
from recipes.stages.batch import MAX_AUTO_MICRO_BATCH, micro_batches
from recipes.stages.optim import Schedule
from recipes.stages.rl import RlStage
from recipes.stages.training_stage import Training
from trainers.checkpoint.checkpoint import StoreCheckpoint
from trainers.checkpoint.loop_state import SourceState
from trainers.data.mixture import Draw
from trainers.engine.build import build_engine, parameter_group
from trainers.objectives.protocol import Objective, unchanged
from trainers.store.manifest import Layout
from trainers.training.context import StageContext
from trainers.training.loop import train
from trainers.training.moving_average import MovingAverage
from trainers.training.optimiser_step import BatchSource, LearningRates, Phase
from trainers.training.outcome import Evaluate, Outcome
from trainers.training.schedule import learning_rate_factor

S = TypeVar("S", bound=Training | RlStage)
R = TypeVar("R", bound=Training)
"""A stage that learns from rows, by its `train` section."""
GROUP = "model"
EVALUATION = -1
"""Stands for the step in evaluations, so that they hide the same tokens every time."""


class Plan(Protocol):
    """Which rows a rank takes: a pure function of the step."""

    def micro_batches(self, step: int) -> Sequence[Any]:
        """Return this rank's share of the step's rows."""

    def drawn(self, steps: int) -> dict[str, Draw]:
        """Return how much was drawn of each source of a mixture in so many steps."""


@dataclass(frozen=True)
class PlannedBatches:
    """Batch source over a materialised set; every step can be resumed from."""

    plan: Plan
    steps_planned: int
    prepare: Callable[[Any, int], Any] = unchanged
    """What the objective reads of a batch at a step."""
    average: MovingAverage | None = None
    """Of the weights; all that there is to remember."""

    def micro_batches(self, step: int) -> list[Any]:
        """Return this rank's share of the step's rows."""
        return [self.prepare(batch, step) for batch in self.plan.micro_batches(step)]

    def drawn(self, steps_done: int) -> dict[str, Draw]:
        """Return how much was drawn of each source of a mixture."""
        return self.plan.drawn(steps_done)

    def can_save(self, steps_done: int) -> bool:
        """Always: rows are a pure function of the step."""
        return True

    def after_step(self, steps_done: int, metrics: Mapping[str, float]) -> str | None:
        """Move the average; never stops early."""
        if self.average is not None:
            self.average.move(steps_done)
        return None

    def state(self) -> SourceState:
        """Give the average."""
        return SourceState(tensors={} if self.average is None else dict(self.average.tensors))

    def load_state(self, state: SourceState) -> None:
        """Take over a saved average."""
        if self.average is not None:
            self.average.tensors = dict(state.tensors)


def one_group(lr: float, schedule: Schedule, steps_planned: int, name: str = GROUP) -> LearningRates:
    """Return the learning rates of a stage with one parameter group."""
    return lambda step: {name: lr * learning_rate_factor(schedule, step, steps_planned)}


def stage_layout(
    context: StageContext, global_batch: int, micro_batch: int | str, *, at_most: int = MAX_AUTO_MICRO_BATCH
) -> Layout:
    """Derive micro-batch and accumulation; a saved state of as many workers keeps its own. Collective."""
    workers = context.ranks.world_size
    saved = context.saved_state
    if saved is not None and saved.layout.workers == workers:
        return saved.layout
    micro, accumulation = micro_batches(global_batch, workers, micro_batch, at_most=at_most)
    return Layout(workers=workers, micro_batch=micro, accumulation=accumulation)


class Share(TypedDict):
    """Which rows of a step a rank takes, as plans of batches are told it."""

    global_batch: int
    workers: int
    rank: int
    micro_batch: int


@dataclass(frozen=True)
class TrainingPlan(Generic[S]):
    """A stage's way through the loop, as its settings lay it down."""

    spec: S
    context: StageContext
    steps: int
    global_batch: int
    layout: Layout
    checkpoint: StoreCheckpoint

    @property
    def share(self) -> Share:
        """What this rank takes of every step's rows."""
        return Share(
            global_batch=self.global_batch,
            workers=self.layout.workers,
            rank=self.context.ranks.rank,
            micro_batch=self.layout.micro_batch,
        )

    def run(self, phases: Sequence[Phase], source: BatchSource, evaluate: Evaluate | None) -> Outcome:
        """Train to the end or to a stop rule, each step through all phases, and turn to the writing; collective."""
        first, *further = phases
        observer = self.context.observer
        outcome = train(
            first.engine,
            first.objective,
            source,
            learning_rates=first.learning_rates,
            cadence=self.spec.cadence(),
            checkpoint=self.checkpoint,
            evaluate=evaluate,
            observer=observer,
            seed=self.context.seed,
            further=further,
        )
        observer.phase("write")
        return outcome


def plan_training(spec: S, context: StageContext, num_rows: int) -> TrainingPlan[S]:
    """Derive steps and layout from recipe and rows, and find where the stage's state is kept; collective."""
    steps, batch = spec.steps(num_rows), spec.batch()
    assert steps is not None
    assert batch is not None
    raise_findings(batch.rules(context.ranks.world_size), StageError)
    layout = stage_layout(context, batch.size, spec.shard.micro_batch, at_most=spec.largest_micro_batch)
    return TrainingPlan(spec, context, steps, batch.size, layout, context.checkpoint(layout))


def single_phase(
    training: TrainingPlan[R], module: nn.Module, objective: Objective, *, name: str = "", lr_ratio: float = 1.0
) -> Phase:
    """Put a module under an engine that trains it as one parameter group, in training mode; collective."""
    settings, context = training.spec.train, training.context
    group = parameter_group(GROUP, module, settings.optimizer)
    engine = build_engine(
        module, [group], training.spec.shard, clip=settings.gradient_clipping, device=context.ranks.device
    )
    engine.module.train()
    rates = one_group(settings.optimizer.lr * lr_ratio, settings.schedule, training.steps)
    return Phase(name, engine, objective, rates)
