"""One step: in each phase forwards and backwards of every micro-batch, a collective of metrics, the update."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from recipes.errors import StageError
from trainers.checkpoint.loop_state import LoopState, SourceState
from trainers.data.mixture import Draw
from trainers.engine.protocol import Engine
from trainers.objectives.protocol import Objective
from trainers.runtime import distributed
from trainers.runtime.observer import Observer
from trainers.runtime.randomness import seed_torch, stream_seed


class BatchSource(Protocol):
    """Gives the micro-batches of each step; a step is numbered from 0, `steps_done` counts."""

    @property
    def steps_planned(self) -> int:
        """Steps of a run to its end."""

    def micro_batches(self, step: int) -> Sequence[Any]:
        """Return this rank's micro-batches, equally many on every rank; may run collectives.

        Each has `to(device)` and `sample_ids_B`, row numbers of which -1 is a filler.
        """

    def drawn(self, steps_done: int) -> Mapping[str, Draw]:
        """Return how much was drawn of each source of a mixture; of other rows nothing."""

    def can_save(self, steps_done: int) -> bool:
        """Tell whether the state after `steps_done` steps can be resumed from."""

    def after_step(self, steps_done: int, metrics: Mapping[str, float]) -> str | None:
        """Take the step's global metrics; return the name of a stop rule (equal on all ranks) to end here."""

    def state(self) -> SourceState:
        """Give the state to save; called where `can_save` is True."""

    def load_state(self, state: SourceState) -> None:
        """Take over a saved state."""


LearningRates = Callable[[int], Mapping[str, float]]
"""Learning rate of each parameter group at a step, from 0."""


@dataclass(frozen=True)
class Phase:
    """A part of a step with an engine of its own: every phase runs its forwards, backwards and update in turn."""

    name: str
    """Tells its gradient norm and learning rate from the other phases'."""
    engine: Engine
    objective: Objective
    learning_rates: LearningRates


@dataclass(frozen=True)
class StepResult:
    loop: LoopState
    metrics: dict[str, float]
    sample_ids: list[int]
    stop_requested: bool


def run_step(
    phases: Sequence[Phase], source: BatchSource, loop: LoopState, observer: Observer, seed: int
) -> StepResult:
    """Run one step: in each phase forwards and backwards of every micro-batch, a collective of metrics, the update."""
    started = time.perf_counter()
    batches = source.micro_batches(loop.steps_done)
    weights = [phases[0].objective.weight(batch) for batch in batches]
    samples = sum(int((batch.sample_ids_B >= 0).sum()) for batch in batches)
    total_weight, total_samples = distributed.all_sum([sum(weights), samples])
    if total_weight <= 0:
        raise StageError(f"step {loop.steps_done}: no batch of any worker has a target (rows {_ids(batches)})")
    metrics: dict[str, float] = {}
    losses: list[Tensor] = []
    stops, applied = 0.0, True
    for phase in phases:
        found = _run_phase(phase, batches, total_weight, loop.steps_done, observer, seed)
        metrics |= found.metrics
        losses, stops, applied = found.losses, stops + found.stops, found.applied
        if not applied:
            break
    metrics |= {"weight": total_weight, "samples": total_samples}
    metrics["skipped_steps"] = float(loop.skipped_steps + (not applied))
    metrics["step_s"] = time.perf_counter() - started
    metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
    after = replace(
        loop,
        steps_done=loop.steps_done + 1,
        skipped_steps=loop.skipped_steps + (not applied),
        samples=loop.samples + int(total_samples),
        weight=loop.weight + total_weight,
    )
    return StepResult(after, metrics, [] if applied else _suspects(batches, losses), stops > 0)


@dataclass(frozen=True)
class _PhaseResult:
    metrics: dict[str, float]
    losses: list[Tensor]
    stops: float
    applied: bool


def _run_phase(
    phase: Phase, batches: Sequence[Any], total_weight: float, step: int, observer: Observer, seed: int
) -> _PhaseResult:
    """Run the forwards, the backwards and the update of one engine."""
    engine, lrs = phase.engine, phase.learning_rates(step)
    sums: dict[str, list[Tensor | float]] = {}
    peaks: dict[str, list[Tensor]] = {}
    losses: list[Tensor] = []
    for batch in batches:
        seed_torch(_noise_seed(seed, step, batch))
        output = phase.objective.loss(engine.module, batch.to(engine.device))
        engine.backward(output.loss_sum / total_weight)
        losses.append(output.loss_sum.detach())
        for name, (value, weight) in output.metrics.items():
            sums.setdefault(name, []).append(value)
            sums.setdefault(f"{name}/weight", []).append(weight)
        for name, largest in output.maxima.items():
            peaks.setdefault(name, []).append(largest)
    names, peak_names = sorted(sums), sorted(peaks)
    local = [float(sum(float(value) for value in sums[name])) for name in names]
    slots = _in_own_slot([max(float(value) for value in peaks[name]) for name in peak_names])
    *totals, stops = distributed.all_sum([*local, *slots, float(observer.stop_requested())])
    info = engine.step(lrs)
    totals, of_ranks = totals[: len(names)], totals[len(names) :]
    by_name = dict(zip(names, totals, strict=True))
    metrics = {
        name: by_name[name] / by_name[f"{name}/weight"]
        for name in names
        if not name.endswith("/weight") and by_name[f"{name}/weight"] != 0
    }
    metrics |= {name: max(of_ranks[place :: len(peak_names)]) for place, name in enumerate(peak_names)}
    ending = f"/{phase.name}" if phase.name else ""
    metrics |= {f"lr/{name}" if len(lrs) > 1 else f"lr{ending}": lr for name, lr in lrs.items()}
    return _PhaseResult({**metrics, f"grad_norm{ending}": info.grad_norm}, losses, stops, info.applied)


def _in_own_slot(values: Sequence[float]) -> list[float]:
    """Return room for every rank's values with this rank's filled in: their sum over ranks holds them all."""
    empty = [0.0] * len(values)
    return [
        value for rank in range(distributed.world_size()) for value in (values if rank == distributed.rank() else empty)
    ]


def _suspects(batches: Sequence[Any], losses: Sequence[Tensor]) -> list[int]:
    """Return the rows whose micro-batch has a non-finite loss on any rank; else all rows of the step."""
    found = [batch for batch, loss in zip(batches, losses, strict=True) if not bool(torch.isfinite(loss))]
    parts = distributed.gather_json([_ids(found), _ids(batches)])
    named = {row for suspects, _ in parts for row in suspects} or {row for _, rows in parts for row in rows}
    return sorted(named)


def _ids(batches: Sequence[Any]) -> list[int]:
    return [int(row) for batch in batches for row in batch.sample_ids_B.tolist() if row >= 0]


def _noise_seed(seed: int, step: int, batch: Any) -> int:
    """Key the noise of a micro-batch's forward by what is in it, never by rank or history."""
    return stream_seed(seed, "noise", step, int(batch.sample_ids_B[0]))
