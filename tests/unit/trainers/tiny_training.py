"""A tiny training: its engine, source, objective and place in a store."""

import contextlib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from recipes.errors import Preempted
from recipes.stages.answers import Cadence
from recipes.stages.optim import AdamW
from tests.observers import Quiet
from trainers.checkpoint.checkpoint import StoreCheckpoint
from trainers.checkpoint.loop_state import SourceState
from trainers.engine.build import parameter_group
from trainers.engine.plain import PlainEngine
from trainers.objectives.protocol import ObjectiveOutput
from trainers.store.manifest import Layout
from trainers.store.store import Store
from trainers.training.loop import train
from trainers.training.outcome import Outcome

STEPS = 8
LAYOUT = Layout(workers=1, micro_batch=2, accumulation=2)


@dataclass(frozen=True)
class Rows:
    inputs: Tensor
    sample_ids_B: Tensor

    def to(self, device: torch.device) -> "Rows":
        return self


@dataclass
class Source:
    """Two micro-batches a step; remembers a sum and a tensor, as PPO remembers its controller and its best policy."""

    steps_planned: int = STEPS
    seen: list[list[int]] = field(default_factory=list)
    total: float = 0.0
    best: Tensor = field(default_factory=lambda: torch.zeros(3))

    def micro_batches(self, step: int) -> Sequence[Rows]:
        generator = torch.Generator().manual_seed(step)
        self.seen.append([4 * step + row for row in range(4)])
        inputs = torch.randn(4, 3, generator=generator) * (1 + self.total / 100)
        rows = torch.arange(4 * step, 4 * step + 4)
        return [Rows(inputs[:2], rows[:2]), Rows(inputs[2:], rows[2:])]

    def drawn(self, steps_done: int) -> dict[str, Any]:
        return {}

    def can_save(self, steps_done: int) -> bool:
        return True

    def after_step(self, steps_done: int, metrics: Mapping[str, float]) -> str | None:
        self.total += steps_done
        self.best = self.best + metrics["loss"]
        return None

    def state(self) -> SourceState:
        return SourceState({"total": self.total}, {"best": self.best})

    def load_state(self, state: SourceState) -> None:
        self.total, self.best = state.values["total"], state.tensors["best"]


class Noisy(nn.Module):
    """A small network with dropout, so that the generator's state matters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)


class Squares:
    def weight(self, batch: Rows) -> float:
        return float(len(batch.sample_ids_B))

    def loss(self, module: nn.Module, batch: Rows) -> ObjectiveOutput:
        loss = (module(batch.inputs).squeeze(-1) - batch.inputs.sum(-1)).square().sum()
        return ObjectiveOutput(loss, {"loss": (loss.detach(), self.weight(batch))})


@dataclass
class Listener(Quiet):
    stop_at: int | None = None
    on_step: Callable[[int], None] = lambda step: None
    steps: list[int] = field(default_factory=list)
    now: int = 0

    def phase(self, name: str, **progress: float) -> None:
        self.now = int(progress.get("step", self.now))

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self.steps.append(step)
        self.on_step(step)

    def stop_requested(self) -> bool:
        return self.stop_at is not None and self.now >= self.stop_at


def make_engine() -> PlainEngine:
    module = Noisy()
    group = parameter_group("model", module, AdamW(lr=0.05, weight_decay=0.1))
    engine = PlainEngine(module, [group], clip=1.0, device=torch.device("cpu"))
    module.train()
    return engine


def open_checkpoint(uri: str, stage: str = "base", **changes: Any) -> StoreCheckpoint:
    store = Store.open(uri)
    lease = store.take_lease("run", stage)
    fields = {"store": store, "run": "run", "stage": stage, "fingerprint": "f" * 64, "lease": lease, "layout": LAYOUT}
    return StoreCheckpoint(**{**fields, "versions": {"torch": "1"}, **changes})


@dataclass
class Ran:
    engine: PlainEngine
    source: Source
    listener: Listener
    outcome: Outcome | None

    @property
    def digest(self) -> str:
        """Over weights, moments, step count, what the source knows, and losses' history in `best`."""
        found = hashlib.sha256()
        for piece in self.engine.state_out():
            found.update(f"{piece.group}{piece.name}".encode() + piece.values.numpy().tobytes())
        found.update(repr((self.engine.steps_applied, self.source.total)).encode() + self.source.best.numpy().tobytes())
        return found.hexdigest()


def run(
    checkpoint: StoreCheckpoint, *, save_every: int = 1, steps: int = STEPS, rates_behind: int = 0, **listening: Any
) -> Ran:
    """Train; with `rates_behind` the learning rates are those of so many steps before."""
    engine, source, listener = make_engine(), Source(steps), Listener(**listening)
    outcome = None
    with contextlib.suppress(Preempted):
        outcome = train(
            engine, Squares(), source, learning_rates=lambda step: {"model": 0.05 / (1 + step - rates_behind)},
            cadence=Cadence(save_every, 10**6), checkpoint=checkpoint, evaluate=None, observer=listener, seed=3,
        )  # fmt: skip
    return Ran(engine, source, listener, outcome)
