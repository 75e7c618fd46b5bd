"""Saving beside training: nothing waits, nothing is lost or differs, and what cannot be resumed from is noticed."""

import contextlib
import errno
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recipes.errors import CapacityError, Preempted, StageError, StoreDamaged
from recipes.optim import AdamW
from trainers import checkpoint as checkpoint_module
from trainers.background import HostBuffer
from trainers.checkpoint import StoreCheckpoint
from trainers.engine.build import parameter_group
from trainers.engine.plain import PlainEngine
from trainers.engine.protocol import StateSlice
from trainers.loop import Cadence, LoopState, Outcome, SourceState, train
from trainers.objectives.protocol import ObjectiveOutput
from trainers.store import local_files
from trainers.store.files import StoreFull
from trainers.store.manifest import Layout
from trainers.store.store import Store

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
class Listener:
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


def run(checkpoint: StoreCheckpoint, *, save_every: int = 1, steps: int = STEPS, **listening: Any) -> Ran:
    engine, source, listener = make_engine(), Source(steps), Listener(**listening)
    outcome = None
    with contextlib.suppress(Preempted):
        outcome = train(
            engine, Squares(), source, learning_rates=lambda step: {"model": 0.05 / (1 + step)},
            cadence=Cadence(save_every, 10**6), checkpoint=checkpoint, evaluate=None, observer=listener, seed=3,
        )  # fmt: skip
    return Ran(engine, source, listener, outcome)


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return str(tmp_path / "store")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> str:
    return run(open_checkpoint(str(tmp_path_factory.mktemp("straight"))), save_every=10**6).digest


@pytest.mark.parametrize("stop_at", range(STEPS))
def test_a_stop_after_any_step_changes_nothing(uri: str, straight: str, stop_at: int) -> None:
    first = run(open_checkpoint(uri), save_every=3, stop_at=stop_at)
    second = run(open_checkpoint(uri), save_every=3)
    assert first.source.seen + second.source.seen == [[4 * step + row for row in range(4)] for step in range(STEPS)]
    assert second.digest == straight
    assert second.outcome is not None
    assert second.outcome.steps_done == second.outcome.steps_planned == STEPS


def test_a_resume_of_a_resume_of_a_resume_changes_nothing(uri: str, straight: str) -> None:
    seen = []
    for stop_at in (1, 3, 4, None):
        last = run(open_checkpoint(uri), save_every=1, stop_at=stop_at)
        seen += last.source.seen
    assert seen == [[4 * step + row for row in range(4)] for step in range(STEPS)]
    assert last.digest == straight


def test_saving_does_not_disturb_training(uri: str, straight: str) -> None:
    assert run(open_checkpoint(uri), save_every=1).digest == straight


def test_a_finished_stage_that_is_resumed_trains_no_more(uri: str, straight: str) -> None:
    run(open_checkpoint(uri))
    again = run(open_checkpoint(uri))
    assert again.source.seen == []
    assert again.digest == straight


# Beside training


def test_training_goes_on_while_a_state_is_written_and_waits_at_the_next_save(
    uri: str, straight: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer of the second save ends only when training is two steps further; a third never runs beside it."""
    real = checkpoint_module.write_tensors
    ahead = threading.Event()
    running: list[int] = []
    most = [0]
    late: list[int] = []

    def slow(store: Store, pieces: Any, **place: Any) -> Any:
        running.append(place["step"])
        most[0] = max(most[0], len(running))
        if place["step"] == 4:
            assert ahead.wait(60), "training waited for the save"
            late.append(place["step"])
        written = real(store, pieces, **place)
        running.remove(place["step"])
        return written

    monkeypatch.setattr(checkpoint_module, "write_tensors", slow)
    ran = run(open_checkpoint(uri), save_every=2, on_step=lambda step: ahead.set() if step >= 5 else None)
    assert late == [4]
    assert most == [1]
    assert ran.digest == straight
    latest = Store.open(uri).latest_state("run", "base")
    assert latest is not None
    assert latest.step == STEPS


def test_an_error_of_a_save_is_raised_at_the_next_step(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = checkpoint_module.write_tensors
    failed, further = threading.Event(), threading.Event()

    def fail(store: Store, pieces: Any, **place: Any) -> Any:
        if place["step"] < 4:
            return real(store, pieces, **place)
        assert further.wait(60)
        failed.set()
        raise CapacityError("the disk is gone")

    def wait(step: int) -> None:
        if step == 5:
            further.set()
            assert failed.wait(60)
            time.sleep(0.2)

    monkeypatch.setattr(checkpoint_module, "write_tensors", fail)
    steps: list[int] = []
    with pytest.raises(CapacityError, match="the disk is gone"):
        run(open_checkpoint(uri), save_every=2, on_step=lambda step: (steps.append(step), wait(step))[0])
    assert steps[-1] == 5
    latest = Store.open(uri).latest_state("run", "base")
    assert latest is not None
    assert latest.step == 2, "the last good state stays"


def test_the_last_save_is_waited_for(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = checkpoint_module.write_tensors

    def slow(*arguments: Any, **place: Any) -> Any:
        time.sleep(0.3 if place["step"] > 3 else 0)
        return real(*arguments, **place)

    monkeypatch.setattr(checkpoint_module, "write_tensors", slow)
    for stop_at, step in ((4, 5), (None, STEPS)):
        run(open_checkpoint(uri), save_every=3, stop_at=stop_at)
        latest = Store.open(uri).latest_state("run", "base")
        assert latest is not None
        assert latest.step == step


def test_what_training_changes_meanwhile_is_not_in_the_state(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy is taken before `save` returns, of the engine and of the source."""
    release = threading.Event()
    real = checkpoint_module.write_tensors

    def slow(*arguments: Any, **place: Any) -> Any:
        if place["step"] == 2:
            assert release.wait(60)
        return real(*arguments, **place)

    checkpoint, engine = open_checkpoint(uri), make_engine()
    best = torch.zeros(3)
    checkpoint.save(engine, LoopState(steps_done=1), SourceState({"n": [1]}, {"best": best}))
    monkeypatch.setattr(checkpoint_module, "write_tensors", slow)
    wanted = {f"{p.group}:{p.name}": p.values.clone() for p in engine.state_out()}
    values = {"n": [2]}
    checkpoint.save(engine, LoopState(steps_done=2), SourceState(values, {"best": best}))
    with torch.no_grad():
        best.fill_(7)
        values["n"].append(9)
        for piece in engine.state_out():
            piece.values.fill_(3)
    release.set()
    checkpoint.flush()
    fresh = make_engine()
    restored = open_checkpoint(uri).restore(fresh)
    assert restored is not None
    assert restored[1].values == {"n": [2]}
    assert torch.equal(restored[1].tensors["best"], torch.zeros(3))
    for piece in fresh.state_out():
        assert torch.equal(piece.values, wanted[f"{piece.group}:{piece.name}"])


def test_memory_is_flat_over_200_saves(uri: str) -> None:
    checkpoint, engine = open_checkpoint(uri), make_engine()
    sizes: list[int] = []
    for step in range(1, 201):
        checkpoint.save(engine, LoopState(steps_done=step), SourceState())
        sizes.append(checkpoint._buffer.num_bytes)
        if step == 20:
            checkpoint.flush()
            before = resident_bytes()
    checkpoint.flush()
    assert len(set(sizes)) == 1
    assert resident_bytes() - before < 8 << 20
    assert threading.active_count() < 20
    assert len(Store.open(uri).files.names("refs/states/run/base")) == 3  # two states, one barrier


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_the_buffer_is_taken_once() -> None:
    buffer = HostBuffer()
    pieces = [StateSlice("param", "w", (5,), 0, torch.arange(5.0)), StateSlice("exp_avg", "w", (5,), 0, torch.ones(5))]
    held = buffer.copy(pieces)
    assert [piece.values.tolist() for piece in held] == [[0, 1, 2, 3, 4], [1] * 5]
    place = held[0].values.data_ptr()
    again = buffer.copy([replace(pieces[0], values=torch.zeros(5)), pieces[1]])
    assert again[0].values.data_ptr() == place
    assert held[0].values.tolist() == [0] * 5


# What a resume would miss is noticed at the first save


class Forgets:
    """An engine that leaves something out of what it gives or takes."""

    def __init__(self, engine: PlainEngine, what: str) -> None:
        self._engine = engine
        self._what = what

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def state_out(self) -> Iterator[StateSlice]:
        for piece in self._engine.state_out():
            if self._what == f"out {piece.group}" and piece.name.endswith("0.weight"):
                continue
            yield piece

    def state_in(self, read: Any, *, steps_applied: int) -> None:
        def partly(group: str, name: str, start: int, stop: int) -> Tensor:
            found = read(group, name, start, stop)
            return found * 0 if self._what == f"in {group}" else found

        self._engine.state_in(partly, steps_applied=0 if self._what == "in steps" else steps_applied)


@pytest.mark.parametrize(
    "what", [f"{way} {group}" for way in ("out", "in") for group in ("param", "exp_avg", "exp_avg_sq")] + ["in steps"]
)
def test_an_engine_that_forgets_is_noticed_at_the_first_save(uri: str, what: str) -> None:
    engine: Any = Forgets(make_engine(), what)
    for step in range(2):
        for batch in Source().micro_batches(step):
            engine.backward(Squares().loss(engine.module, batch).loss_sum)
        engine.step({"model": 0.1})
    with pytest.raises((StageError, StoreDamaged), match=r"a resume would not be exact|has no tensor"):
        open_checkpoint(uri).save(engine, LoopState(steps_done=2), SourceState())


def test_a_source_whose_values_do_not_come_back_is_noticed(uri: str) -> None:
    with pytest.raises(StageError, match="values of the source"):
        open_checkpoint(uri).save(make_engine(), LoopState(steps_done=1), SourceState({"seen": (1, 2)}))


@pytest.mark.parametrize("item", ["total", "best", "steps_done", "lr step", "noise", "exp_avg", "param"])
def test_leaving_one_item_out_of_a_resume_changes_the_result(
    uri: str, straight: str, monkeypatch: pytest.MonkeyPatch, item: str
) -> None:
    """Negative control: whatever of the state is not taken over shows in the digest, or is refused."""
    run(open_checkpoint(uri), stop_at=3)
    real = StoreCheckpoint.restore

    def forget(self: StoreCheckpoint, engine: Any) -> Any:
        before = {(p.group, p.name): p.values.clone() for p in engine.state_out()}
        found = real(self, engine)
        assert found is not None
        loop, source = found
        if item in ("total", "best"):
            values = {"total": 0.0} if item == "total" else source.values
            tensors = {"best": torch.zeros(3)} if item == "best" else source.tensors
            source = SourceState(values, tensors)
        elif item in ("steps_done", "lr step", "noise"):
            loop = replace(loop, steps_done=loop.steps_done - 1)
        else:
            for piece in engine.state_out():
                if piece.group == item:
                    piece.values.copy_(before[piece.group, piece.name])
        return loop, source

    monkeypatch.setattr(StoreCheckpoint, "restore", forget)
    assert run(open_checkpoint(uri)).digest != straight


# A full disk


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_pauses_training_until_there_is_room(
    uri: str, straight: str, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    said: list[str] = []
    checkpoint = open_checkpoint(uri)
    checkpoint.store.wait_for_room(60, said.append)
    refusals = [0]
    real = os.write

    def write(descriptor: int, data: Any) -> int:
        if 5 <= refusals[0] < 8 or (refusals[0] == 0 and len(Store.open(uri).files.names("refs/states/run/base")) == 3):
            refusals[0] = max(refusals[0], 5) + 1
            raise OSError(code, os.strerror(code))
        return real(descriptor, data)

    monkeypatch.setattr(local_files.os, "write", write)
    ran = run(checkpoint)
    assert refusals == [8]
    assert ran.digest == straight
    assert "needed" in said[0]
    assert f"store {uri}: cannot write" in said[0]
    assert "free" in said[0]
    assert "waiting for room, at most 60 s" in said[0]
    assert "there is room again" in said[-1]
    assert Store.open(uri).verify().damage == []


def test_without_room_for_too_long_the_last_good_state_stays(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run(open_checkpoint(uri), stop_at=3)
    before = Store.open(uri).latest_state("run", "base")
    checkpoint = open_checkpoint(uri)
    checkpoint.store.wait_for_room(0.3, lambda text: None)

    def full(descriptor: int, data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(local_files.os, "write", full)
        with pytest.raises(StoreFull, match=r"needed \d+ bytes, free \d+ bytes"):
            run(checkpoint)
    assert Store.open(uri).latest_state("run", "base") == before
    run(open_checkpoint(uri))


# How exact


def test_the_class_of_exactness_is_derived_and_kept(uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(open_checkpoint(uri), stop_at=1)
    same = open_checkpoint(uri)
    run(same, stop_at=2)
    assert same.exactness == "bit-exact"
    assert "base goes on after 2 steps: bit-exact" in capsys.readouterr().out
    other = open_checkpoint(uri, versions={"torch": "2"})
    run(other, stop_at=3)
    assert other.exactness == "order-exact (torch: 1, then 2)"
    back = open_checkpoint(uri, layout=LAYOUT.model_copy(update={"workers": 2}), versions={"torch": "2"})
    run(back, stop_at=4)
    assert back.exactness == "order-exact (torch: 1, then 2; workers: 1, then 2)"


def test_a_changed_setting_makes_it_another_stage(uri: str) -> None:
    run(open_checkpoint(uri), steps=4)
    with pytest.raises(StageError, match="belongs to fingerprint ffffffffffff, not eeeeeeeeeeee"):
        run(open_checkpoint(uri, fingerprint="e" * 64))
    change = {"field": "stages.base.train.steps", "before": 4, "after": 8}
    allowed = open_checkpoint(uri, fingerprint="e" * 64, accepts=["f" * 64], changes=[change])
    ran = run(allowed, stop_at=5)
    assert ran.source.seen[0] == [16, 17, 18, 19]
    assert allowed.made_changes == [{**change, "step": 4}]
    assert allowed.exactness == "continuing (stages.base.train.steps changed at step 4)"
    later = open_checkpoint(uri, fingerprint="e" * 64, accepts=["f" * 64], changes=[change])
    run(later)
    assert later.made_changes == [{**change, "step": 4}]
    replaced = open_checkpoint(uri, fingerprint="d" * 64, replaced=["e" * 64])
    assert run(replaced).source.seen[0] == [0, 1, 2, 3]
