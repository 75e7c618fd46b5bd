"""A small language model that learns in the loop: its rows, objectives, engine, observer and place in a store."""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from recipes.errors import Preempted
from recipes.stages.answers import Cadence
from recipes.stages.lora import Lora
from recipes.stages.optim import AdamW, Schedule
from recipes.stages.sharding import Shard
from tests.numerics.outcomes import Case
from tests.observers import Quiet
from trainers.checkpoint.checkpoint import StoreCheckpoint
from trainers.checkpoint.loop_state import SourceState
from trainers.data.batches import TokenBatch
from trainers.engine import config
from trainers.engine.build import build_engine, parameter_group
from trainers.engine.protocol import Engine
from trainers.models.decoder import build_decoder
from trainers.models.lora import add_adapter
from trainers.models.protocol import TokenizerFacts
from trainers.models.token_losses import TokenLosses
from trainers.objectives.language_model import LanguageModelObjective
from trainers.objectives.protocol import ObjectiveOutput
from trainers.runtime import distributed
from trainers.store.manifest import Layout
from trainers.store.store import Store
from trainers.training.loop import Checkpoint, train
from trainers.training.outcome import Outcome
from trainers.training.schedule import learning_rate_factor

VOCAB, LENGTH, GLOBAL_BATCH, MICRO_BATCHES, STEPS = 64, 32, 8, 2, 10
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "gpt2": {
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": LENGTH,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
}
FINGERPRINT = "f" * 64


def global_batch(step: int) -> TokenBatch:
    """Give learnable rows: odd tokens follow from the one before; the second half of the rows has few targets."""
    generator = torch.Generator().manual_seed(1000 + step)
    ids = torch.randint(0, VOCAB, (GLOBAL_BATCH, LENGTH), generator=generator)
    ids[:, 1::2] = (ids[:, 0::2] * 3 + 1) % VOCAB
    half = LENGTH // 2
    segments = torch.ones(GLOBAL_BATCH, LENGTH, dtype=torch.long)
    segments[:, half:] = 2
    positions = torch.cat([torch.arange(half), torch.arange(half)]).expand(GLOBAL_BATCH, LENGTH)
    ends = torch.randint(3, 12, (GLOBAL_BATCH,), generator=generator)
    ends[: GLOBAL_BATCH // 2] = LENGTH
    mask = (torch.arange(LENGTH)[None] < ends[:, None]) & (positions > 0) & (torch.arange(LENGTH)[None] % 2 == 1)
    rows = torch.arange(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH)
    return TokenBatch(ids, segments, positions, mask, rows)


@dataclass
class Rows:
    """Batch source over `global_batch`; a step in `broken` has a row whose loss is not finite, on the last rank."""

    steps_planned: int
    broken: tuple[int, ...] = ()
    seen: list[list[int]] = field(default_factory=list)
    memory: int = 0

    def micro_batches(self, step: int) -> list[TokenBatch]:
        whole = global_batch(step)
        share = GLOBAL_BATCH // distributed.world_size()
        size = share // MICRO_BATCHES
        start = distributed.rank() * share
        self.seen.append(whole.sample_ids_B.tolist())
        batches = [_rows(whole, start + index * size, size) for index in range(MICRO_BATCHES)]
        if step in self.broken and distributed.rank() == distributed.world_size() - 1:
            batches[-1] = replace(batches[-1], position_ids_BT=batches[-1].position_ids_BT - 1000)
        return batches

    def drawn(self, steps_done: int) -> dict[str, Any]:
        return {}

    def can_save(self, steps_done: int) -> bool:
        return True

    def after_step(self, steps_done: int, metrics: Mapping[str, float]) -> str | None:
        self.memory += steps_done
        return None

    def state(self) -> SourceState:
        return SourceState({"memory": self.memory}, {"square": torch.tensor([self.memory**2])})

    def load_state(self, state: SourceState) -> None:
        self.memory = state.values["memory"]
        assert int(state.tensors["square"]) == self.memory**2


def _rows(batch: TokenBatch, start: int, size: int) -> TokenBatch:
    rows = slice(start, start + size)
    return TokenBatch(
        batch.input_ids_BT[rows],
        batch.segment_ids_BT[rows],
        batch.position_ids_BT[rows],
        batch.loss_mask_BT[rows],
        batch.sample_ids_B[rows],
    )


class PoisonedObjective(LanguageModelObjective):
    """Gives an infinite loss for rows whose positions were spoiled."""

    def loss(self, module: torch.nn.Module, batch: TokenBatch) -> ObjectiveOutput:
        is_broken = bool((batch.position_ids_BT < 0).any())
        found = super().loss(module, replace(batch, position_ids_BT=batch.position_ids_BT.clamp(min=0)))
        return ObjectiveOutput(found.loss_sum * (float("inf") if is_broken else 1.0), found.metrics)


class PerRankMeans(LanguageModelObjective):
    """The negative control: every rank takes its own mean, as frameworks do that average averages."""

    def weight(self, batch: TokenBatch) -> float:
        return 1.0

    def loss(self, module: torch.nn.Module, batch: TokenBatch) -> ObjectiveOutput:
        found = super().loss(module, batch)
        return ObjectiveOutput(found.loss_sum / super().weight(batch), found.metrics)


@dataclass
class Record(Quiet):
    """Observer that remembers."""

    stop_at: int | None = None
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    phases: list[str] = field(default_factory=list)
    now: int = 0

    def phase(self, name: str, **progress: float) -> None:
        self.phases.append(name)
        self.now = int(progress.get("step", self.now))

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        if "lr" in values:
            self.steps.append(step)
            self.losses.append(values.get("loss", float("nan")))
            self.norms.append(values.get("grad_norm", float("nan")))

    def stop_requested(self) -> bool:
        return self.stop_at is not None and self.now >= self.stop_at and distributed.rank() == 0


class NoCheckpoint:
    """Keeps nothing."""

    is_saving = False

    def save(self, engine: Engine, loop: Any, source: SourceState) -> None:
        pass

    def check(self) -> None:
        pass

    def flush(self) -> None:
        pass

    def restore(self, engine: Engine) -> None:
        return None


def make_engine(case: Case) -> Engine:
    """Build the small model of a case under its engine; ZeRO 3 really shards all of it, unless told otherwise."""
    config.PERSISTENCE_THRESHOLD = case.get("persistence_threshold", 0)
    name = case.get("architecture", "llama")
    facts, device = TokenizerFacts(VOCAB, 0, 1), distributed.join().device
    model: Any = build_decoder({"type": name, **ARCHITECTURES[name]}, facts, seed=7, device=device)
    if case.get("lora"):
        add_adapter(model, Lora(r=4, dropout=case.get("dropout", 0.0)), seed=8)
    module = TokenLosses(model)
    shard = Shard(
        engine=case["engine"],
        zero=case.get("zero", 0),
        precision=case.get("precision", "fp32"),
        offload=case.get("offload", "none"),
        gradient_checkpointing=case.get("recompute", False),
    )
    group = parameter_group("model", module, AdamW(lr=case.get("lr", 1e-2), weight_decay=0.1))
    engine = build_engine(module, [group], shard, clip=case.get("clip", 1.0), device=device)
    engine.module.train()
    return engine


class Trained(NamedTuple):
    """A training that ended."""

    engine: Engine
    observer: Record
    outcome: Outcome | None
    """None after a preemption."""


def run_train(
    case: Case, source: Rows, *, observer: Record | None = None, checkpoint: Checkpoint | None = None
) -> Trained:
    """Run the loop on a case."""
    engine = make_engine(case)
    observer = observer or Record()
    objective = {"tokens": LanguageModelObjective, "poisoned": PoisonedObjective, "rank-means": PerRankMeans}[
        case.get("objective", "tokens")
    ]()
    schedule = Schedule(name="cosine", warmup_steps=2)
    outcome = None
    with contextlib.suppress(Preempted):
        outcome = train(
            engine,
            objective,
            source,
            learning_rates=lambda step: {"model": case.get("lr", 1e-2) * learning_rate_factor(schedule, step, STEPS)},
            cadence=Cadence(10**6, 10**6, case.get("max_skipped_steps", 0)),
            checkpoint=checkpoint or NoCheckpoint(),
            evaluate=None,
            observer=observer,
            seed=3,
        )
    return Trained(engine, observer, outcome)


def open_checkpoint(case: Case, *, take: bool = True) -> StoreCheckpoint:
    """Open the case's place in its store, under a new lease."""
    store = Store.open(case["store"])
    lease = store.take_lease("run", case.get("stage", case["name"])) if take and distributed.rank() == 0 else 1
    layout = Layout(
        workers=distributed.world_size(),
        micro_batch=GLOBAL_BATCH // distributed.world_size() // MICRO_BATCHES,
        accumulation=MICRO_BATCHES,
    )
    return StoreCheckpoint(
        store, "run", case.get("stage", case["name"]), FINGERPRINT, int(distributed.broadcast_json(lease)), layout, {}
    )


def digest_of(engine: Engine) -> list[str]:
    """Hash the bits of this rank's state and of the whole working parameters, for every rank."""

    def pieces() -> Iterator[bytes]:
        for piece in engine.state_out():
            yield f"{piece.group}{piece.name}{piece.start}".encode()
            yield piece.values.cpu().numpy().tobytes()
        for name, tensor in engine.full_parameters():
            yield name.encode()
            yield tensor.float().numpy().tobytes()
        yield str(engine.steps_applied).encode()

    total = hashlib.sha256()
    for piece in pieces():
        total.update(piece)
    return [str(value) for value in distributed.gather_json(total.hexdigest())]
