"""The one training loop: time, skipping, saving, evaluating, stopping; objectives and sources know the rest."""

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NoReturn, Protocol

import torch
from torch import Tensor

from recipes.errors import Preempted, StageError
from trainers.checkpoint.loop_state import LoopState, SourceState
from trainers.engine.joint import JointState
from trainers.engine.protocol import Engine, StatefulEngine
from trainers.objectives.protocol import Objective
from trainers.runtime import distributed
from trainers.runtime.observer import Interrupted, Observer
from trainers.runtime.randomness import seed_torch, stream_seed

STOP_WAIT_S = 5.0
"""How long a stop waits for the next state that can be saved."""


class BatchSource(Protocol):
    """Gives the micro-batches of each step; a step is numbered from 0, `steps_done` counts."""

    @property
    def steps_planned(self) -> int:
        """Steps of a run to its end."""

    def micro_batches(self, step: int) -> Sequence[Any]:
        """Return this rank's micro-batches, equally many on every rank; may run collectives.

        Each has `to(device)` and `sample_ids_B`, row numbers of which -1 is a filler.
        """

    def can_save(self, steps_done: int) -> bool:
        """Tell whether the state after `steps_done` steps can be resumed from."""

    def after_step(self, steps_done: int, metrics: Mapping[str, float]) -> str | None:
        """Take the step's global metrics; return the name of a stop rule (equal on all ranks) to end here."""

    def state(self) -> SourceState:
        """Give the state to save; called where `can_save` is True."""

    def load_state(self, state: SourceState) -> None:
        """Take over a saved state."""


class Checkpoint(Protocol):
    """Writes and reads training state; collective."""

    def save(self, engine: StatefulEngine, loop: LoopState, source: SourceState) -> None:
        """Take a resumable state, which is committed by the next `flush` at the latest."""

    @property
    def is_saving(self) -> bool:
        """Whether a save is under way on this rank."""

    def check(self) -> None:
        """Raise the error of a save that has failed since; never waits, no collective."""

    def flush(self) -> None:
        """Return when all that was saved is committed."""

    def restore(self, engine: StatefulEngine) -> tuple[LoopState, SourceState] | None:
        """Load the newest committed state into the engine; None: there is none."""


@dataclass(frozen=True)
class Cadence:
    """How often things happen, in steps."""

    save_every: int
    evaluate_every: int
    max_skipped_steps: int = 3


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
        return {
            "train": {name: value for name, value in self.last_metrics.items() if name != "step_s"},
            "samples": self.samples,
            "skipped_steps": self.skipped_steps,
        }


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
    further: Sequence[Phase] = (),
) -> Outcome:
    """Train to the end of the source or to a stop rule, resuming from the newest state; collective.

    `further` phases follow in every step on the same batches; a phase whose update is skipped ends the step. Raises
    Preempted after saving when any rank was asked to stop, StageError past the limit of skipped steps.
    """
    phases = [Phase("", engine, objective, learning_rates), *further]
    training = _Training(phases, source, cadence, checkpoint, evaluate, observer, seed)
    training.restore()
    with observer.answers_stops(training.has_unsaved):
        return training.run()


class _Training:
    """A training under way: where it is, and what of it is saved."""

    def __init__(
        self,
        phases: Sequence[Phase],
        source: BatchSource,
        cadence: Cadence,
        checkpoint: Checkpoint,
        evaluate: Evaluate | None,
        observer: Observer,
        seed: int,
    ) -> None:
        self._phases = phases
        engines = [phase.engine for phase in phases]
        self._whole: StatefulEngine = engines[0] if len(engines) == 1 else JointState(engines)
        self._source = source
        self._planned = source.steps_planned
        self._cadence = cadence
        self._checkpoint = checkpoint
        self._evaluate_model = evaluate
        self._observer = observer
        self._seed = seed
        self._loop = LoopState()
        self._saved_at = 0
        self._evaluation = Evaluation()
        self._evaluated_at = -1
        self._metrics: dict[str, float] = {}

    def restore(self) -> None:
        """Go back to the newest saved state, if there is one."""
        restored = self._checkpoint.restore(self._whole)
        if restored is not None:
            self._loop, source_state = restored
            self._source.load_state(source_state)
        self._saved_at = self._loop.steps_done
        gc.collect()
        gc.freeze()

    def has_unsaved(self) -> bool:
        """Tell whether more than the running step would be lost here; from any thread."""
        return self._saved_at != self._loop.steps_done or self._checkpoint.is_saving

    def run(self) -> Outcome:
        """Train to the end, or to a stop, which waits for the running step alone."""
        try:
            if not self._loop.is_judged:
                self._judge()
            while not self._is_at_end:
                self._step()
            if self._evaluate_model is not None and self._evaluated_at != self._loop.steps_done:
                self._evaluate()
        except Interrupted:
            self._leave()
        self._checkpoint.flush()
        return _outcome(self._loop, self._planned, self._evaluation, self._metrics)

    @property
    def _is_at_end(self) -> bool:
        return self._loop.steps_done >= self._planned or self._loop.rule is not None

    def _phase(self, name: str) -> None:
        self._observer.phase(name, step=self._loop.steps_done, steps_planned=self._planned)

    def _step(self) -> None:
        self._phase("train")
        self._checkpoint.check()
        step = _run_step(self._phases, self._source, self._loop, self._observer, self._seed)
        self._loop, self._metrics = replace(step.loop, is_judged=False), step.metrics
        if self._loop.skipped_steps > self._cadence.max_skipped_steps:
            raise StageError(_skip_message(self._loop, self._cadence, step.sample_ids))
        self._observer.metrics(self._loop.steps_done, self._metrics)
        self._judge()
        done, can_save = self._loop.steps_done, self._source.can_save(self._loop.steps_done)
        if can_save and (self._is_at_end or done - self._saved_at >= self._cadence.save_every):
            self._save()
        if step.stop_requested and not self._is_at_end and (can_save or self._is_far_from_saving()):
            raise Interrupted
        if self._evaluate_model is not None and not self._is_at_end and done % self._cadence.evaluate_every == 0:
            self._evaluate()

    def _judge(self) -> None:
        """Ask the source whether a rule ends the stage, which may take rollouts."""
        rule = self._source.after_step(self._loop.steps_done, self._metrics)
        self._loop = replace(self._loop, rule=rule, is_judged=True)

    def _is_far_from_saving(self) -> bool:
        """Tell whether the steps to the next state that can be saved take longer than a stop waits; collective."""
        done, planned = self._loop.steps_done, self._planned
        steps = next(count for count in range(1, planned + 1) if self._source.can_save(done + count))
        step_s = distributed.all_sum([self._metrics["step_s"]])[0] / distributed.world_size()
        return steps * step_s > STOP_WAIT_S

    def _evaluate(self) -> None:
        assert self._evaluate_model is not None
        self._phase("evaluate")
        found = self._evaluate_model()
        named = {f"eval/{name}": value for name, value in found.finite().items()}
        self._observer.metrics(self._loop.steps_done, named)
        self._evaluation, self._evaluated_at = found, self._loop.steps_done

    def _save(self) -> None:
        self._phase("save")
        self._checkpoint.save(self._whole, self._loop, self._source.state())
        self._saved_at = self._loop.steps_done

    def _leave(self) -> NoReturn:
        """Save what is not saved yet, and raise Preempted; between two states that can be saved the first one stays."""
        done = self._loop.steps_done
        if self._saved_at != done and self._source.can_save(done):
            self._save()
        self._checkpoint.flush()
        kept = f"the state after {self._saved_at} is saved" if self._saved_at else "there is no state yet"
        raise Preempted(f"stopped after {done} of {self._planned} steps; {kept}")


def _outcome(loop: LoopState, planned: int, evaluation: Evaluation, metrics: dict[str, float]) -> Outcome:
    return Outcome(
        state="completed" if loop.rule is None else "stopped_by",
        rule=loop.rule,
        steps_done=loop.steps_done,
        steps_planned=planned,
        skipped_steps=loop.skipped_steps,
        samples=loop.samples,
        weight=loop.weight,
        evaluation=evaluation,
        last_metrics=metrics,
    )


@dataclass(frozen=True)
class _Step:
    loop: LoopState
    metrics: dict[str, float]
    sample_ids: list[int]
    stop_requested: bool


def _run_step(phases: Sequence[Phase], source: BatchSource, loop: LoopState, observer: Observer, seed: int) -> _Step:
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
    return _Step(after, metrics, [] if applied else _suspects(batches, losses), stops > 0)


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


def _skip_message(loop: LoopState, cadence: Cadence, sample_ids: list[int]) -> str:
    shown = ", ".join(str(row) for row in sample_ids[:32]) + (", ..." if len(sample_ids) > 32 else "")
    return (
        f"loss or gradient was not finite in {loop.skipped_steps} of {loop.steps_done} steps, which were skipped "
        f"(max_skipped_steps is {cadence.max_skipped_steps}); rows of the last one: {shown}"
    )
