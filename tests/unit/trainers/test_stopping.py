"""A stop while the loop evaluates, or asks whether a rule ends the stage: the state is saved and resumed exactly."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from recipes.errors import Preempted
from recipes.stages.answers import Cadence
from tests.unit.trainers import tiny_training as tiny
from trainers.runtime.observer import Interrupted, counted, interruptible, raise_if_stopping
from trainers.training import loop
from trainers.training.loop import train
from trainers.training.outcome import Evaluation


@dataclass(frozen=True)
class Batch:
    sample_ids_B: Tensor


def batches(count: int) -> list[Batch]:
    return [Batch(torch.tensor([2 * number, 2 * number + 1])) for number in range(count)]


@dataclass
class Listener:
    """Hears phases and rows, and asks to stop once it has heard of one so often."""

    stop_in: tuple[str, int] = ("", 0)
    heard: list[tuple[str, dict[str, float]]] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    is_answered: bool = False
    has_unsaved: Callable[[], bool] | None = None
    unsaved: list[tuple[str, bool]] = field(default_factory=list)
    """In each phase, whether something would be lost there."""

    def phase(self, name: str, **progress: float) -> None:
        self.heard.append((name, progress))
        if self.has_unsaved is not None:
            self.unsaved.append((name, self.has_unsaved()))

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self.steps.append(step)

    def notify(self, text: str) -> None:
        raise AssertionError(text)

    def stop_requested(self) -> bool:
        name, times = self.stop_in
        return bool(times) and sum(heard == name for heard, _ in self.heard) >= times

    @contextlib.contextmanager
    def answers_stops(self, has_unsaved: Callable[[], bool]) -> Iterator[None]:
        self.is_answered, self.has_unsaved = True, has_unsaved
        yield
        self.is_answered = False


def test_rows_are_counted_over_all_batches() -> None:
    listener = Listener()
    assert len(list(counted(batches(3), listener, "perplexity", 5, step=1, steps_planned=2))) == 3
    assert [(name, rows["rows"], rows["rows_planned"]) for name, rows in listener.heard] == [
        ("perplexity", 0, 5), ("perplexity", 2, 5), ("perplexity", 4, 5), ("perplexity", 5, 5),
    ]  # fmt: skip
    assert all(rows["step"] == 1 for _, rows in listener.heard)


def test_a_stop_ends_an_evaluation_between_two_batches() -> None:
    read = interruptible(batches(9), Listener(stop_in=("evaluate", 3)), "evaluate", 18)
    assert [next(read), next(read)]
    with pytest.raises(Interrupted):
        next(read)


class Ruled:
    """The tiny source, with a rule that is looked for in steps that a stop can interrupt, as rollouts are."""

    def __init__(self, source: Any, listener: Listener, ends_at: int) -> None:
        self._source, self._listener, self._ends_at = source, listener, ends_at
        self.asked: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def after_step(self, steps_done: int, metrics: Mapping[str, float]) -> str | None:
        for _ in range(3):
            self._listener.phase("rollout")
            raise_if_stopping(self._listener)
        self.asked.append(steps_done)
        return "kl" if steps_done == self._ends_at else None


def run(uri: str, listener: Listener, **changes: Any) -> Any:
    engine, source = tiny.make_engine(), changes.pop("source", None) or tiny.Source(12)
    wanted: dict[str, Any] = {"cadence": Cadence(100, 4), "evaluate": None, **changes}
    try:
        outcome = train(
            engine, tiny.Squares(), source, learning_rates=lambda step: {"model": 0.05 / (1 + step)},
            checkpoint=tiny.open_checkpoint(uri), observer=listener, seed=3, **wanted,
        )  # fmt: skip
    except Preempted as error:
        return str(error)
    weights = [piece.values.clone() for piece in engine.state_out()]
    return outcome, weights


def assert_equal(one: Any, other: Any) -> None:
    assert (one[0].ending(), one[0].evaluation) == (other[0].ending(), other[0].evaluation)
    assert all(torch.equal(*pair) for pair in zip(one[1], other[1], strict=True))


def test_a_stop_in_an_evaluation_saves_the_step_that_it_evaluates(uri: str) -> None:
    def evaluation(listener: Listener) -> Any:
        return lambda: Evaluation({"loss": float(len(list(interruptible(batches(5), listener, "evaluate", 10))))})

    whole = Listener()
    straight = run(f"{uri}-straight", whole, evaluate=evaluation(whole))
    stopped = Listener(stop_in=("evaluate", 8))  # the second evaluation, after step 8
    assert "after 8 of 12 steps" in run(uri, stopped, evaluate=evaluation(stopped))
    again = Listener()
    assert_equal(run(uri, again, evaluate=evaluation(again)), straight)
    assert again.steps[0] == 9


@pytest.mark.parametrize("rollouts", [2, 8, 19])
def test_a_stop_in_the_rollouts_of_a_rule_is_gone_on_with_by_asking_again(uri: str, rollouts: int) -> None:
    def ruled(listener: Listener) -> Ruled:
        return Ruled(tiny.Source(12), listener, ends_at=7)

    whole = Listener()
    straight = run(f"{uri}-straight", whole, source=ruled(whole))
    assert straight[0].rule == "kl"
    assert straight[0].steps_done == 7
    stopped = Listener(stop_in=("rollout", rollouts))
    assert "is saved" in run(uri, stopped, source=ruled(stopped))
    again = Listener()
    source = ruled(again)
    made = run(uri, again, source=source)
    assert source.asked[0] == -(-rollouts // 3)
    assert (made[0].rule, made[0].steps_done) == ("kl", 7)
    assert all(torch.equal(*pair) for pair in zip(made[1], straight[1], strict=True))


def test_a_rule_that_was_not_asked_for_would_be_lost(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control of `is_judged`: without it the stage goes on past its rule."""
    stopped = Listener(stop_in=("rollout", 20))  # in the rollouts after step 7, which the rule ends
    run(uri, stopped, source=Ruled(tiny.Source(12), stopped, ends_at=7))
    monkeypatch.setattr(
        loop.LoopState, "is_judged", property(lambda self: True, lambda self, value: None), raising=False
    )
    again = Listener()
    made = run(uri, again, source=Ruled(tiny.Source(12), again, ends_at=7))
    assert (made[0].rule, made[0].steps_done) == (None, 12)


def test_between_two_states_a_stop_waits_only_where_the_next_one_is_near(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Seldom(Ruled):
        def can_save(self, steps_done: int) -> bool:
            return steps_done % 6 == 0

    for patience, saved, name in ((1e9, 6, "near"), (0.0, 0, "far")):
        monkeypatch.setattr(loop, "STOP_WAIT_S", patience)
        listener = Listener(stop_in=("train", 2))
        said = run(f"{uri}-{name}", listener, source=Seldom(tiny.Source(12), Listener(), 99))
        assert f"stopped after {saved or 2} of 12 steps" in said
        assert ("state after 6" if saved else "no state yet") in said


def test_a_stop_is_answered_in_the_loop_alone(uri: str) -> None:
    listener = Listener()
    seen = []

    class Watched(type(tiny.Squares())):  # type: ignore[misc]
        def loss(self, module: Any, batch: Any) -> Any:
            seen.append(listener.is_answered)
            return super().loss(module, batch)

    tiny.Squares = Watched
    run(uri, listener)
    assert seen
    assert all(seen)
    assert not listener.is_answered


def test_a_stop_has_to_be_answered_where_steps_would_be_lost(uri: str) -> None:
    listener = Listener()
    checkpoint = tiny.open_checkpoint(uri)
    evaluate = lambda: Evaluation({"loss": 1.0})  # noqa: E731
    train(
        tiny.make_engine(), tiny.Squares(), tiny.Source(4), learning_rates=lambda step: {"model": 0.05}, seed=3,
        cadence=Cadence(2, 1), checkpoint=checkpoint, evaluate=evaluate, observer=listener,
    )  # fmt: skip
    checkpoint.flush()
    assert not listener.has_unsaved()
    found = dict(enumerate(listener.unsaved))
    assert found[0] == ("train", False)  # before the first step
    assert ("evaluate", True) in listener.unsaved  # after step 1, which is not saved
    assert all(unsaved for name, unsaved in listener.unsaved if name == "save")
