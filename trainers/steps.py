"""What training stages share: batches that follow from the step, learning rates, cadence, how a batch is divided."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from recipes.derive import MAX_AUTO_MICRO_BATCH, micro_batches
from recipes.optim import Schedule
from recipes.sharding import Shard
from recipes.train import ImageTrain, Train
from trainers.engine.build import build_engine, parameter_group
from trainers.engine.protocol import Engine
from trainers.loop import Cadence, LearningRates, SourceState
from trainers.schedule import learning_rate_factor
from trainers.stage import StageContext
from trainers.store.manifest import Layout

GROUP = "model"
EVALUATION = -1
"""Stands for the step in evaluations, so that they hide the same tokens every time."""


def unchanged(batch: Any, step: int) -> Any:
    """Return the batch as it is."""
    return batch


class Plan(Protocol):
    """Which rows a rank takes: a pure function of the step."""

    def micro_batches(self, step: int) -> Sequence[Any]:
        """Return this rank's share of the step's rows."""


@dataclass(frozen=True)
class PlannedBatches:
    """Batch source over a materialised set: nothing to remember, every step can be resumed from."""

    plan: Plan
    steps_planned: int
    prepare: Callable[[Any, int], Any] = unchanged
    """What the objective reads of a batch at a step."""

    def micro_batches(self, step: int) -> list[Any]:
        """Return this rank's share of the step's rows."""
        return [self.prepare(batch, step) for batch in self.plan.micro_batches(step)]

    def can_save(self, steps_done: int) -> bool:
        """Always: rows are a pure function of the step."""
        return True

    def after_step(self, steps_done: int, metrics: Mapping[str, float]) -> str | None:
        """Never stops early."""
        return None

    def state(self) -> SourceState:
        """Nothing."""
        return SourceState()

    def load_state(self, state: SourceState) -> None:
        """Nothing."""


def training_engine(module: nn.Module, train: Train | ImageTrain, shard: Shard, device: torch.device) -> Engine:
    """Put a module under an engine that trains it as one parameter group, in training mode."""
    group = parameter_group(GROUP, module, train.optimizer)
    engine = build_engine(module, [group], shard, clip=train.gradient_clipping, device=device)
    engine.module.train()
    return engine


def one_group(lr: float, schedule: Schedule, steps_planned: int, name: str = GROUP) -> LearningRates:
    """Return the learning rates of a stage with one parameter group."""
    return lambda step: {name: lr * learning_rate_factor(schedule, step, steps_planned)}


def cadence_of(train: Train | ImageTrain) -> Cadence:
    """Return how often a stage saves and evaluates."""
    return Cadence(train.save_every, train.evaluate_every, train.max_skipped_steps)


def stage_layout(
    context: StageContext, global_batch: int, micro_batch: int | str, *, at_most: int = MAX_AUTO_MICRO_BATCH
) -> Layout:
    """Derive micro-batch and accumulation; a saved state of as many workers keeps its own. Collective."""
    workers = context.ranks.world_size
    saved = context.find_state()
    if saved is not None and saved.layout.workers == workers:
        return saved.layout
    micro, accumulation = micro_batches(global_batch, workers, micro_batch, at_most=at_most)
    return Layout(workers=workers, micro_batch=micro, accumulation=accumulation)
