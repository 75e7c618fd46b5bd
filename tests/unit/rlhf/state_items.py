"""Trainings that run once, die, or go on without one item of their state; shared by the tests of state items."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from recipes.errors import Preempted
from recipes.stages.answers import Cadence
from trainers.checkpoint.checkpoint import StoreCheckpoint
from trainers.checkpoint.loop_state import LoopState, SourceState
from trainers.engine.joint import BASE, JointState
from trainers.engine.protocol import STATE_GROUPS
from trainers.objectives.protocol import ObjectiveOutput
from trainers.store.manifest import Layout
from trainers.store.store import Store
from trainers.training.loop import train
from trainers.training.optimiser_step import Phase
from trainers.training.outcome import Outcome

LOOP = ("steps_done", "skipped_steps", "samples", "weight")
"""What every loop remembers; `rule` has a test of its own."""
SKIPPED_STEP = 1
Made = dict[str, Any]
"""Hashes and counts of a finished training, by name."""


@dataclass
class Part:
    """A training, ready to run once."""

    engine: Any
    source: Any
    objective: Any
    listener: Any
    further: Sequence[Phase] = ()

    @property
    def whole(self) -> Any:
        """What is saved: the engine, or all engines as one."""
        return JointState([self.engine, *(phase.engine for phase in self.further)]) if self.further else self.engine


class Poisoned:
    """An objective of which one step's loss is not finite: the step is skipped, which is state, too."""

    def __init__(self, objective: Any, listener: Any, step: int = SKIPPED_STEP) -> None:
        self._objective, self._listener, self._step = objective, listener, step
        self.weight = objective.weight

    def loss(self, module: Any, batch: Any) -> ObjectiveOutput:
        found: ObjectiveOutput = self._objective.loss(module, batch)
        is_bad = self._listener.steps_done == self._step
        return replace(found, loss_sum=found.loss_sum * float("nan")) if is_bad else found


class Killed(BaseException):
    """Stands for SIGKILL."""


class Fatal:
    """An objective that ends everything at a call in a step."""

    def __init__(self, objective: Any, listener: Any, step: int, call: int) -> None:
        self._objective, self._listener, self._step, self._calls = objective, listener, step, call
        self.weight = objective.weight

    def loss(self, module: Any, batch: Any) -> ObjectiveOutput:
        self._calls -= self._listener.steps_done == self._step
        if self._calls == 0:
            raise Killed
        found: ObjectiveOutput = self._objective.loss(module, batch)
        return found


def train_once(part: Part, uri: Path, rates: dict[str, float], save_every: int) -> Made:
    """Go on from what is saved, to the end or to a stop; returns all that the stage's artifact is made of, hashed."""
    store = Store.open(str(uri))
    lease = store.take_lease("run", "stage")
    layout = Layout(workers=1, micro_batch=4, accumulation=2)
    checkpoint = StoreCheckpoint(store, "run", "stage", "f" * 64, lease, layout, {})
    outcome: Outcome | None = None
    try:
        outcome = train(
            part.engine, Poisoned(part.objective, part.listener), part.source, learning_rates=lambda step: rates,
            cadence=Cadence(save_every, 10**6), checkpoint=checkpoint, evaluate=None, observer=part.listener, seed=3,
            further=part.further,
        )  # fmt: skip
    except Preempted:
        pass
    except Killed:
        checkpoint.flush()  # here the thread that saves outlives what was killed
        raise
    source = part.source.state()
    found: dict[str, Any] = {
        "outcome": outcome and (outcome.state, outcome.rule, outcome.steps_done),
        "counts": outcome and (outcome.skipped_steps, outcome.samples, outcome.weight),
        "steps applied": part.whole.steps_applied,
        "values": dict(source.values),
    }
    pieces = [(f"{piece.group}:{piece.name}", piece.values) for piece in part.whole.state_out()]
    best = [(f"source:{name}", tensor) for name, tensor in source.tensors.items()]
    for name, tensor in [*pieces, *part.whole.full_parameters(), *best]:
        found[name] = hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()
    return found


def saved_step(uri: Path) -> int:
    """The step of the newest state; 0: there is none."""
    manifest = Store.open(str(uri)).latest_state("run", "stage")
    return manifest.step if manifest else 0


def leave_out(monkeypatch: pytest.MonkeyPatch, item: str, start: SourceState) -> None:
    """From now on restoring misses one item, which stays as a new stage has it."""
    kind, _, name = item.partition(" ")
    real = StoreCheckpoint.restore

    def restore(self: StoreCheckpoint, engine: Any) -> tuple[LoopState, SourceState] | None:
        before = {(piece.group, piece.name): piece.values.clone() for piece in engine.state_out()}
        found = real(self, engine)
        assert found is not None
        loop, source = found
        if kind == "loop":
            assert getattr(loop, name) != getattr(LoopState(), name), (
                f"{name} is as at the start: leaving it out is blind"
            )
            loop = replace(loop, **{name: getattr(LoopState(), name)})
        elif kind == "source":
            assert source.values[name] != start.values[name]
            source = SourceState({**source.values, name: start.values[name]}, source.tensors)
        elif kind == "tensors":
            assert source.tensors
            source = SourceState(source.values, start.tensors)
        elif kind == "engine":
            held = {(piece.group, piece.name): piece.values.clone().flatten() for piece in engine.state_out()}
            count = engine.steps_applied
            kept = {"steps_applied": 0, "first": count // BASE * BASE, "second": count % BASE}
            engine.state_in(lambda group, key, a, b: held[group, key][a:b], steps_applied=kept[name])
        else:
            missed = [piece for piece in engine.state_out() if piece.group == kind and name in piece.name]
            assert missed
            for piece in missed:
                piece.values.copy_(before[piece.group, piece.name])
        return loop, source

    monkeypatch.setattr(StoreCheckpoint, "restore", restore)


def items(parts: Iterable[str]) -> list[str]:
    return [f"{group} {part}" for group in STATE_GROUPS for part in parts]
