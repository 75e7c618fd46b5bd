"""What the driver hears of a stage's progress: one unit per kind of stage, and speeds that say what they count."""

import math
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from launch.records.record import RunRecord
from launch.runs.stage_entry import StageObserver
from recipes.loading.load import parse_recipe
from recipes.models.architecture import MODEL_TYPES
from recipes.stages.kinds import Stage
from trainers.store.store import Store

TRAIN = {"steps": 8, "global_batch": 4, "sequence_length": 16, "optimizer": {"lr": 1e-3}}
TEXT = {"source": "text", "files": ["a.txt"]}
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
SPECIAL = {"cls_token": "<|cls|>", "mask_token": "<|mask|>"}
STAGES: dict[str, dict[str, Any]] = {
    "base": {
        "kind": "pretrain",
        "architecture": {"family": "decoder", "type": "llama", **SIZES},
        "tokenizer": {"train": "bpe", "vocab_size": 300},
        "data": TEXT,
        "train": TRAIN,
    },
    "words": {
        "kind": "pretrain",
        "architecture": {"family": "encoder", "type": "bert", **SIZES},
        "tokenizer": {"train": "bpe", "vocab_size": 300, **SPECIAL},
        "data": TEXT,
        "train": TRAIN,
    },
    "chat": {"kind": "finetune", "init_from": "./base", "data": TEXT, "train": TRAIN},
    "judge": {"kind": "reward", "init_from": "chat", "data": TEXT, "train": TRAIN},
    "policy": {
        "kind": "rl",
        "actor": "chat",
        "rewards": {"judge": {"model": "judge"}},
        "prompts": TEXT,
        "rollout": {"prompts_per_iteration": 8, "samples_per_prompt": 2, "max_new_tokens": 8},
        "algorithm": {"name": "ppo", "iterations": 3, "epochs": 2, "mini_batches": 2, "optimizer": {"lr": 1e-3}},
    },
}


class Rank:
    """A rank other than the first, which writes no metrics."""

    rank = 1

    def __init__(self) -> None:
        self.beats: list[tuple[str, dict[str, Any]]] = []

    def beat(self, phase: str, **values: Any) -> None:
        self.beats.append((phase, values))


def observer_of(stage: str, rank: Rank, started_from: str | None = None) -> StageObserver:
    spec: Stage = parse_recipe({"name": "a", "stages": STAGES}).stages[stage]
    return StageObserver(rank, None, {}, spec.progress(MODEL_TYPES.get(started_from or "")), spec.shown)  # type: ignore[arg-type]


def test_ppo_counts_iterations_in_rollouts_and_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    rank = Rank()
    observer = observer_of("policy", rank)
    for step in range(13):
        if step % 4 == 0:
            clock[0] += 4.0
            observer.phase("rollout", step=step, steps_planned=12)
            observer.metrics(step, {"score_mean": 0.5, "kl": 0.0, "iteration": step / 4})
        if step < 12:
            observer.phase("train", step=step, steps_planned=12)
            observer.metrics(step, {"loss": 9.0, "weight": 40.0, "step_s": 0.01})
    assert [(values["step"], values["steps"], values["unit"]) for _, values in rank.beats] == [
        (iteration, 3, "iteration") for iteration in range(3) for _ in range(5)
    ] + [(3, 3, "iteration")]
    last = rank.beats[-1][1]
    assert last["responses_per_s"] == pytest.approx(16 / 4.0)
    assert last["score"] == 0.5
    assert "loss" not in last


@pytest.mark.parametrize(
    ("stage", "started_from", "counted"),
    [
        ("chat", "llama", "target_tokens"),
        ("chat", "bert", "rows"),
        ("chat", None, "target_tokens"),
        ("words", None, "target_tokens"),
        ("base", None, "tokens"),
        ("judge", "llama", "pairs"),
    ],
)
def test_a_speed_says_what_it_counts(stage: str, started_from: str | None, counted: str) -> None:
    rank = Rank()
    observer = observer_of(stage, rank, started_from)
    observer.metrics(1, {"loss": 1.0, "weight": 30.0, "step_s": 0.5})
    observer.phase("train", step=1, steps_planned=8)
    assert rank.beats[-1][1] == {"loss": 1.0, f"{counted}_per_s": 60.0, "step": 1, "steps": 8, "unit": "step"}


class FirstRank(Rank):
    """The rank that writes metrics."""

    rank = 0
    is_asked_to_stop = False
    lines: Callable[[], Iterable[dict[str, Any]]]
    """The metrics in the store, to be looked at where a stop would end the process."""

    def stop_requested(self) -> bool:
        return self.is_asked_to_stop

    @contextmanager
    def answers_stops(self, has_unsaved: Callable[[], bool]) -> Iterator[None]:
        self.has_unsaved = has_unsaved
        yield
        self.left_with = [*self.lines()]


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("launch.runs.stage_entry.time", SimpleNamespace(monotonic=lambda: self.now))


def writing_observer(rank: FirstRank) -> tuple[StageObserver, RunRecord]:
    store = Store.open(f"memory://observer-{secrets.token_hex(8)}")
    record = RunRecord(store, store.new_run("recipe").id)
    job = {"run": record.run, "stage": "base", "attempt": 1}
    spec = parse_recipe({"name": "a", "stages": STAGES}).stages["base"]
    return StageObserver(rank, store, job, spec.progress(), spec.shown), record  # type: ignore[arg-type]


def test_the_longer_a_stage_runs_the_fewer_files_its_metrics_take(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, num_lines = Clock(monkeypatch), 6 * 3600 // 2
    observer, record = writing_observer(FirstRank())
    num_files = []
    for step in range(num_lines):
        clock.now += 2.0
        observer.metrics(step, {"loss": 1.0})
        if clock.now in (250, 3000):
            num_files.append(len(record.folder.segments("metrics/base")))
    observer.flush()
    num_files.append(len(record.folder.segments("metrics/base")))
    assert 250 / 5 * 0.8 <= num_files[0] <= 250 / 5  # one in five seconds
    assert num_files[1] - num_files[0] <= math.log(3000 / 250) / 0.02  # 2 % of the time that has passed
    assert num_files[2] - num_files[1] == (6 * 3600 - 3000) / 60 + 1  # one a minute, and the rest
    assert [line["step"] for line in record.metrics("base")] == list(range(num_lines))


def test_no_line_waits_longer_than_the_interval_for_whatever_the_stage_does(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    observer, record = writing_observer(FirstRank())
    clock.now = 2000.0
    observer.phase("train", step=1, steps_planned=9)
    observer.metrics(1, {"loss": 1.0})
    clock.now += 39.0
    observer.phase("evaluate", step=1, steps_planned=9)
    assert not [*record.metrics("base")]
    clock.now += 2.0
    observer.phase("evaluate", step=1, steps_planned=9)
    assert [line["step"] for line in record.metrics("base")] == [1]


@pytest.mark.parametrize("why", ["save", "write", "stop"])
def test_metrics_are_kept_before_a_state_a_result_and_a_stop(monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    clock, rank = Clock(monkeypatch), FirstRank()
    observer, record = writing_observer(rank)
    clock.now = 5000.0
    observer.stop_requested()
    observer.metrics(7, {"loss": 1.0})
    assert not observer.stop_requested()
    assert not [*record.metrics("base")]
    if why == "stop":
        rank.is_asked_to_stop = True
        assert observer.stop_requested()
    else:
        observer.phase(why)
    assert [line["step"] for line in record.metrics("base")] == [7]


def test_metrics_are_kept_before_a_stop_ends_the_process_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, rank = Clock(monkeypatch), FirstRank()
    observer, record = writing_observer(rank)
    rank.lines = lambda: record.metrics("base")
    clock.now = 5000.0
    observer.stop_requested()
    with observer.answers_stops(lambda: False):
        assert not rank.has_unsaved()
        observer.metrics(7, {"loss": 1.0})
        assert rank.has_unsaved()  # a line that is in no file yet
    assert not rank.has_unsaved()
    assert [line["step"] for line in rank.left_with] == [7]
