"""Stopped and resumed equals straight to the bit; what a resume would miss is noticed; how exact it was is kept."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from recipes.errors import StageError, StoreDamaged
from tests.unit.trainers import tiny_training as tiny
from trainers.checkpoint import checkpoint as checkpoint_module
from trainers.checkpoint.checkpoint import StoreCheckpoint
from trainers.checkpoint.loop_state import LoopState, SourceState
from trainers.engine.protocol import STATE_GROUPS, StateSlice
from trainers.store.store import Store
from trainers.training import optimiser_step

STEPS = 8


@pytest.mark.parametrize("stop_at", range(STEPS))
def test_a_stop_after_any_step_changes_nothing(uri: str, straight: str, stop_at: int) -> None:
    first = tiny.run(tiny.open_checkpoint(uri), save_every=3, stop_at=stop_at)
    second = tiny.run(tiny.open_checkpoint(uri), save_every=3)
    assert first.source.seen + second.source.seen == [[4 * step + row for row in range(4)] for step in range(STEPS)]
    assert second.digest == straight
    assert second.outcome is not None
    assert second.outcome.steps_done == second.outcome.steps_planned == STEPS


def test_a_resume_of_a_resume_of_a_resume_changes_nothing(uri: str, straight: str) -> None:
    seen = []
    for stop_at in (1, 3, 4, None):
        last = tiny.run(tiny.open_checkpoint(uri), save_every=1, stop_at=stop_at)
        seen += last.source.seen
    assert seen == [[4 * step + row for row in range(4)] for step in range(STEPS)]
    assert last.digest == straight


def test_saving_does_not_disturb_training(uri: str, straight: str) -> None:
    assert tiny.run(tiny.open_checkpoint(uri), save_every=1).digest == straight


def test_a_finished_stage_that_is_resumed_trains_no_more(uri: str, straight: str) -> None:
    tiny.run(tiny.open_checkpoint(uri))
    again = tiny.run(tiny.open_checkpoint(uri))
    assert again.source.seen == []
    assert again.digest == straight


# What a resume would miss is noticed at the first save


class Forgets:
    """An engine that leaves something out of what it gives or takes."""

    def __init__(self, engine: Any, what: str) -> None:
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
    engine: Any = Forgets(tiny.make_engine(), what)
    for step in range(2):
        for batch in tiny.Source().micro_batches(step):
            engine.backward(tiny.Squares().loss(engine.module, batch).loss_sum)
        engine.step({"model": 0.1})
    with pytest.raises((StageError, StoreDamaged), match=r"no tensor \w+:layers|step 2 would save, \d+ items"):
        tiny.open_checkpoint(uri).save(engine, LoopState(steps_done=2), SourceState())

    assert Store.open(uri).latest_state("run", "base") is None, "what cannot be loaded is not committed"


@pytest.mark.parametrize("group", ["param", "exp_avg", "exp_avg_sq"])
def test_an_engine_that_forgets_at_a_later_save_is_refused_and_the_states_before_stay(uri: str, group: str) -> None:
    checkpoint = tiny.open_checkpoint(uri)
    whole = tiny.make_engine()
    for step in (1, 2):
        checkpoint.save(whole, LoopState(steps_done=step), SourceState())
    checkpoint.save(Forgets(whole, f"out {group}"), LoopState(steps_done=3), SourceState())
    with pytest.raises(StageError, match=rf"step 3 .* 1 items .*: {group}:layers\.0"):
        checkpoint.flush()
    assert Store.open(uri).states("run", "base")._refs.numbers()[-2:] == [2, 3], "after the lease, two states"
    found = tiny.open_checkpoint(uri).restore(tiny.make_engine())
    assert found is not None
    assert found[0].steps_done == 2


def test_a_first_save_after_a_resume_that_forgets_covers_no_good_state(uri: str) -> None:
    tiny.run(tiny.open_checkpoint(uri), save_every=1, stop_at=2)
    checkpoint = tiny.open_checkpoint(uri)
    engine: Any = Forgets(tiny.make_engine(), "out exp_avg")
    checkpoint.restore(engine)
    with pytest.raises(StoreDamaged, match="has no tensor exp_avg"):
        checkpoint.save(engine, LoopState(steps_done=4), SourceState())
    latest = Store.open(uri).latest_state("run", "base")
    assert latest is not None
    assert latest.step == 3


def test_a_tensor_of_the_source_that_is_not_written_is_noticed(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tiny.open_checkpoint(uri)
    checkpoint.save(tiny.make_engine(), LoopState(steps_done=1), SourceState())
    real = checkpoint_module.write_tensors
    monkeypatch.setattr(
        checkpoint_module, "write_tensors",
        lambda store, pieces, **place: real(store, [p for p in pieces if p.group != "source"], **place),
    )  # fmt: skip
    checkpoint.save(tiny.make_engine(), LoopState(steps_done=2), SourceState(tensors={"best": torch.ones(3)}))
    with pytest.raises(StageError, match=r"step 2 .* 1 items .*: source:best"):
        checkpoint.flush()


def test_a_source_whose_values_do_not_come_back_is_noticed(uri: str) -> None:
    with pytest.raises(StageError, match=r"step 1 would save, 1 items .* source$"):
        tiny.open_checkpoint(uri).save(tiny.make_engine(), LoopState(steps_done=1), SourceState({"seen": (1, 2)}))


@pytest.mark.parametrize("item", ["nothing", "total", "best", "steps_done", "lr step", "noise", *STATE_GROUPS])
def test_leaving_one_item_out_of_a_resume_changes_the_result(
    uri: str, straight: str, monkeypatch: pytest.MonkeyPatch, item: str
) -> None:
    """Negative control: whatever of the state is not taken over shows in the digest; `nothing` left out is exact."""
    tiny.run(tiny.open_checkpoint(uri), stop_at=3)
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
        elif item == "steps_done":
            loop = replace(loop, steps_done=loop.steps_done - 1)
        elif item == "noise":
            real_seed = optimiser_step._noise_seed
            monkeypatch.setattr(
                optimiser_step, "_noise_seed", lambda seed, step, batch: real_seed(seed, step - 1, batch)
            )
        elif item in STATE_GROUPS:
            for piece in engine.state_out():
                if piece.group == item:
                    piece.values.copy_(before[piece.group, piece.name])
        return loop, source

    monkeypatch.setattr(StoreCheckpoint, "restore", forget)
    second = tiny.run(tiny.open_checkpoint(uri), rates_behind=int(item == "lr step"))
    is_missed = second.digest != straight
    assert is_missed == (item != "nothing")


# How exact


def test_the_class_of_exactness_is_derived_and_kept(uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.run(tiny.open_checkpoint(uri), stop_at=1)
    same = tiny.open_checkpoint(uri)
    tiny.run(same, stop_at=2)
    assert same.exactness == "bit-exact"
    assert "base: resuming at step 2, bit-exact" in capsys.readouterr().out
    other = tiny.open_checkpoint(uri, versions={"torch": "2"})
    tiny.run(other, stop_at=3)
    assert other.exactness == "order-exact (torch: 1, then 2)"
    back = tiny.open_checkpoint(uri, layout=tiny.LAYOUT.model_copy(update={"workers": 2}), versions={"torch": "2"})
    tiny.run(back, stop_at=4)
    assert back.exactness == "order-exact (torch: 1, then 2; workers: 1, then 2)"


def test_a_changed_setting_makes_it_another_stage(uri: str) -> None:
    tiny.run(tiny.open_checkpoint(uri), steps=4)
    with pytest.raises(StageError, match=r"fingerprint f{12}, not e{12}"):
        tiny.run(tiny.open_checkpoint(uri, fingerprint="e" * 64))
    change = {"field": "stages.base.train.steps", "before": 4, "after": 8}
    allowed = tiny.open_checkpoint(uri, fingerprint="e" * 64, accepts=["f" * 64], changes=[change])
    ran = tiny.run(allowed, stop_at=5)
    assert ran.source.seen[0] == [16, 17, 18, 19]
    assert allowed.made_changes == [{**change, "step": 4}]
    assert allowed.exactness == "continuing (stages.base.train.steps changed at step 4)"
    later = tiny.open_checkpoint(uri, fingerprint="e" * 64, accepts=["f" * 64], changes=[change])
    tiny.run(later)
    assert later.made_changes == [{**change, "step": 4}]
    replaced = tiny.open_checkpoint(uri, fingerprint="d" * 64, replaced=["e" * 64])
    assert tiny.run(replaced).source.seen[0] == [0, 1, 2, 3]
