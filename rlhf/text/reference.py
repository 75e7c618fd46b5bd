"""What the start of a policy says of every answer that is compared with it: asked once, then kept in the stage's state.

The pass reads a row in the very micro-batch in which training reads it first, so that the first ratios are exactly 1 in
every precision. It takes no copy of the start: before its first update the policy is its start.

Shapes: N rows of a set, two answers each.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.text.preference_objective import Referred, answer_logprobs
from trainers.checkpoint.checkpoint import SOURCE_GROUP
from trainers.checkpoint.loop_state import SourceState
from trainers.data.batches import Batch, BatchPlan, JudgedBatch, PairBatch
from trainers.data.mixture import Draw
from trainers.engine.protocol import Engine
from trainers.runtime import distributed
from trainers.runtime.observer import Observer, counted
from trainers.store.state import TensorReader
from trainers.training.context import StageContext

TRAINING, EVALUATION = "reference_training", "reference_evaluation"
"""Names, in the stage's state, of what the start says of the rows that are trained on and measured."""


@dataclass(frozen=True)
class Reference:
    """Log-probabilities [N, 2] under the start; infinite for rows that nothing reads."""

    table_N2: Tensor

    def refer(self, batch: Batch) -> Referred:
        """Put what the start says beside answers; fillers have nothing."""
        assert isinstance(batch, PairBatch | JudgedBatch)
        rows_B = batch.sample_ids_B
        found_B2 = self.table_N2[rows_B.clamp(min=0)]
        return Referred(batch, torch.where((rows_B >= 0)[:, None], found_B2, 0.0))


@dataclass(frozen=True)
class Asked:
    """Rows that the start is asked for, and this rank's batches of them."""

    name: str
    size: int
    """Rows of the whole set."""
    rows: Collection[int]
    """Rows that have to be known; the same on every rank."""
    batches: Iterable[Batch]


Prepare = Callable[[Sequence[Referred]], list[Referred]]
"""Adds what the loss of a step's batches needs to know of all of them."""


@dataclass(frozen=True)
class ReferredBatches:
    """Batches of a plan with what the start says of them; every step can be resumed from."""

    plan: BatchPlan
    steps_planned: int
    references: Mapping[str, Reference]
    """By name; none of a loss without a reference."""
    prepare: Prepare = list

    def micro_batches(self, step: int) -> list[Referred]:
        """Return this rank's share of the step's rows; collective where their preparation is."""
        reference = self.references.get(TRAINING, no_reference(len(self.plan.dataset)))
        return self.prepare([reference.refer(batch) for batch in self.plan.micro_batches(step)])

    def drawn(self, steps_done: int) -> dict[str, Draw]:
        """Return how much was drawn of each source of a mixture."""
        return self.plan.drawn(steps_done)

    def can_save(self, steps_done: int) -> bool:
        """Always: rows are a pure function of the step."""
        return True

    def after_step(self, steps_done: int, metrics: Mapping[str, float]) -> str | None:
        """Never stops early."""
        return None

    def state(self) -> SourceState:
        """Give what the start said."""
        return SourceState(tensors={name: reference.table_N2 for name, reference in self.references.items()})

    def load_state(self, state: SourceState) -> None:
        """Nothing is left to take over: `saved_tables` gave it before the state replaced the start."""


def no_reference(size: int) -> Reference:
    """What a loss without a reference compares with."""
    return Reference(torch.zeros(size, 2))


def saved_tables(context: StageContext) -> dict[str, Tensor]:
    """The tables of the state that the stage resumes from, by name; collective at the first use."""
    if context.saved_state is None:
        return {}
    with TensorReader(context.store, context.saved_state) as reader:
        names = [name for name in reader.names(SOURCE_GROUP) if name in (TRAINING, EVALUATION)]
        return {name: reader.read(SOURCE_GROUP, name).clone() for name in names}


def training_rows(plan: BatchPlan, steps: int) -> Asked:
    """The rows that are trained on, in the steps in which each comes first."""
    size = len(plan.dataset)
    first = range(min(steps, math.ceil(plan.order.whole / plan.global_batch)))

    def batches() -> Iterator[Batch]:
        for step in first:
            yield from plan.micro_batches(step)

    return Asked(TRAINING, size, {row for step in first for row in plan.sample_ids(step)}, batches())


def ask_start(engine: Engine, asked: Asked, saved: Mapping[str, Tensor], observer: Observer) -> Reference:
    """Ask an engine whose policy is its start for the rows that no saved table has; collective."""
    table_N2 = saved.get(asked.name, torch.full((asked.size, 2), math.inf)).clone()
    if bool(table_N2[sorted(asked.rows)].isfinite().all()):
        return Reference(table_N2)
    engine.module.eval()
    own: list[tuple[int, int, list[float]]] = []
    with torch.no_grad():
        for place, batch in enumerate(counted(asked.batches, observer, "reference", len(asked.rows))):
            assert isinstance(batch, PairBatch | JudgedBatch)
            found_B2 = answer_logprobs(engine.module, batch.to(engine.device)).tolist()
            rows = zip(batch.sample_ids_B.tolist(), found_B2, strict=True)
            own += [(place, row, found) for row, found in rows if row >= 0]
    engine.module.train()
    for _, row, found in sorted(item for part in distributed.gather_json(own) for item in part):
        if not bool(table_N2[row].isfinite().all()):  # a row that comes twice keeps what its first batch gave
            table_N2[row] = torch.tensor(found)
    return Reference(table_N2)
