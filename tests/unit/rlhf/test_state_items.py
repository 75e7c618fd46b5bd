"""Negative controls: whichever item of a PPO's or a LoRA's state a resume leaves out, the result is another one."""

import contextlib
import hashlib
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.errors import Preempted, StageError
from recipes.lora import Lora
from recipes.optim import AdamW
from recipes.sharding import Shard
from trainers import checkpoint as checkpoint_module
from trainers.architectures.lora import add_adapter
from trainers.architectures.token_losses import TokenLosses
from trainers.checkpoint import StoreCheckpoint
from trainers.data.batches import BatchPlan
from trainers.engine.build import build_engine, parameter_group
from trainers.engine.protocol import STATE_GROUPS
from trainers.loop import Cadence, LoopState, Outcome, SourceState, train
from trainers.objectives.language_model import LanguageModelObjective
from trainers.objectives.protocol import ObjectiveOutput
from trainers.steps import GROUP, PlannedBatches
from trainers.store.manifest import Layout
from trainers.store.store import Store

SKIPPED_STEP = 1
CPU = torch.device("cpu")
Made = dict[str, Any]
"""Hashes and counts of a finished training, by name."""


@dataclass
class Part:
    """A training, ready to run once."""

    engine: Any
    source: Any
    objective: Any
    listener: Any


class Poisoned:
    """An objective of which one step's loss is not finite: the step is skipped, which is state, too."""

    def __init__(self, objective: Any, listener: Any) -> None:
        self._objective, self._listener = objective, listener
        self.weight = objective.weight

    def loss(self, module: Any, batch: Any) -> ObjectiveOutput:
        found: ObjectiveOutput = self._objective.loss(module, batch)
        is_bad = self._listener.steps_done == SKIPPED_STEP
        return replace(found, loss_sum=found.loss_sum * float("nan")) if is_bad else found


def train_once(part: Part, uri: str, rates: dict[str, float], save_every: int) -> Made:
    """Go on from what is saved, to the end or to a stop; returns all that the stage's artifact is made of, hashed."""
    store = Store.open(uri)
    lease = store.take_lease("run", "stage")
    layout = Layout(workers=1, micro_batch=4, accumulation=2)
    outcome: Outcome | None = None
    with contextlib.suppress(Preempted):
        outcome = train(
            part.engine, Poisoned(part.objective, part.listener), part.source, learning_rates=lambda step: rates,
            cadence=Cadence(save_every, 10**6), checkpoint=StoreCheckpoint(
                store, "run", "stage", "f" * 64, lease, layout, {}
            ), evaluate=None, observer=part.listener, seed=3,
        )  # fmt: skip
    source = part.source.state()
    found: dict[str, Any] = {
        "outcome": outcome and (outcome.state, outcome.rule, outcome.steps_done),
        "counts": outcome and (outcome.skipped_steps, outcome.samples, outcome.weight),
        "steps applied": part.engine.steps_applied,
        "values": dict(source.values),
    }
    pieces = [(f"{piece.group}:{piece.name}", piece.values) for piece in part.engine.state_out()]
    best = [(f"source:{name}", tensor) for name, tensor in source.tensors.items()]
    for name, tensor in [*pieces, *part.engine.full_parameters(), *best]:
        found[name] = hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()
    return found


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
        elif name == "steps_applied":
            held = {(piece.group, piece.name): piece.values.clone().flatten() for piece in engine.state_out()}
            engine.state_in(lambda group, key, a, b: held[group, key][a:b], steps_applied=0)
        else:
            missed = [piece for piece in engine.state_out() if piece.group == kind and name in piece.name]
            assert missed
            for piece in missed:
                piece.values.copy_(before[piece.group, piece.name])
        return loop, source

    monkeypatch.setattr(StoreCheckpoint, "restore", restore)


# PPO: actor and critic adapters on one network, a value head, an adaptive controller, the best policy so far

PPO_VALUES = ("kl_coef", "start", "best_score", "best_iteration")
PPO_PARTS = (".actor.", ".critic.", "value_head")
LOOP = ("steps_done", "skipped_steps", "samples", "weight")


def ppo_part(build: Callable[..., Any], stop_at: int | None = None, **settings: Any) -> Part:
    controller = {"name": "adaptive", "target": 0.01, "horizon": 50}
    made = build(**{"iterations": 3, "kl_limit": 50.0, "kl_controller": controller, **settings})
    made.listener.stop_at = stop_at
    return Part(made.engine, made.source, made.objective, made.listener)


def run_ppo(part: Part, uri: Path) -> Made:
    return train_once(part, str(uri), {"actor": 1e-2, "critic": 1e-2}, part.source.steps_per_iteration)


@pytest.fixture(scope="module")
def ppo_made(tiny_ppo: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Made, Path]:
    """What a straight run makes, and a store with the state after its second iteration."""
    folder = tmp_path_factory.mktemp("ppo")
    straight = run_ppo(ppo_part(tiny_ppo), folder / "straight")
    stopped = ppo_part(tiny_ppo)
    stopped.listener.stop_at = stopped.source.steps_per_iteration + 1
    run_ppo(stopped, folder / "store")
    return straight, folder / "store"


@pytest.fixture
def ppo_runs(ppo_made: tuple[Made, Path], tmp_path: Path) -> tuple[Made, Path]:
    """The same, with a store of the test's own."""
    return ppo_made[0], Path(shutil.copytree(ppo_made[1], tmp_path / "store"))


def test_the_items_of_a_ppo_are_all_tried(tiny_ppo: Callable[..., Any], ppo_runs: tuple[Made, Path]) -> None:
    """A new item needs its own negative control below; with none left out the resume is exact."""
    straight, store = ppo_runs
    manifest = Store.open(str(store)).latest_state("run", "stage")
    assert manifest is not None
    assert set(manifest.values["source"]) == set(PPO_VALUES)  # type: ignore[arg-type]
    assert {field.name for field in fields(LoopState)} == {*LOOP, "rule"}
    assert set(manifest.tensors) == {*STATE_GROUPS, checkpoint_module.SOURCE_GROUP}
    for entry in manifest.tensors["param"]:
        assert sum(part in entry.name for part in PPO_PARTS) == 1, entry.name
    assert run_ppo(ppo_part(tiny_ppo), store) == straight


def items(parts: Iterable[str]) -> list[str]:
    return [f"{group} {part}" for group in STATE_GROUPS for part in parts]


BEST_ITEMS = ["source best_score", "source best_iteration", "tensors"]
PPO_ITEMS = ["source kl_coef", "source start", *(f"loop {name}" for name in LOOP)]


@pytest.mark.parametrize("item", [*PPO_ITEMS, *items(PPO_PARTS), "engine steps_applied"])
def test_leaving_an_item_of_a_ppo_out_is_noticed(
    tiny_ppo: Callable[..., Any], ppo_runs: tuple[Made, Path], monkeypatch: pytest.MonkeyPatch, item: str
) -> None:
    straight, store = ppo_runs
    part = ppo_part(tiny_ppo)
    leave_out(monkeypatch, item, part.source.state())
    with contextlib.suppress(StageError):  # a refusal is notice, too
        assert run_ppo(part, store) != straight


@pytest.mark.parametrize("item", BEST_ITEMS)
def test_leaving_the_best_policy_out_is_noticed(
    tiny_ppo: Callable[..., Any],
    ppo_made: tuple[Made, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    item: str,
) -> None:
    """After the last update nothing makes them again: a stage that ended by a rule returns to that policy."""
    straight, store = ppo_made[0], shutil.copytree(ppo_made[1].with_name("straight"), tmp_path / "finished")
    part = ppo_part(tiny_ppo)
    leave_out(monkeypatch, item, part.source.state())
    assert run_ppo(part, store) != straight


def test_leaving_out_the_rule_that_ended_a_ppo_is_noticed(
    tiny_ppo: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = {"kl_limit": 1e-6}
    straight = run_ppo(ppo_part(tiny_ppo, **limit), tmp_path)
    assert run_ppo(ppo_part(tiny_ppo, **limit), tmp_path) == straight
    part = ppo_part(tiny_ppo, **limit)
    leave_out(monkeypatch, "loop rule", part.source.state())
    assert run_ppo(part, tmp_path) != straight


# LoRA: two matrices a layer, dropout, a frozen base that is not in the state

LORA_PARTS = ("lora_A", "lora_B")
STEPS = 6


def lora_part(language: Any, listener: Any, base_seed: int = 0) -> Part:
    model = language.model(base_seed)
    add_adapter(model, Lora(r=4, dropout=0.2), seed=3)
    module = TokenLosses(model)
    engine = build_engine(
        module, [parameter_group(GROUP, module, AdamW(lr=1e-2))], Shard(engine="plain"), clip=1.0, device=CPU
    )
    module.train()
    source = PlannedBatches(BatchPlan(language.text(), 0, 8, 1, 0, 4), STEPS)
    return Part(engine, source, LanguageModelObjective(), listener)


@pytest.fixture(scope="module")
def new_lora(tiny_language: Any, tiny_ppo: Callable[..., Any]) -> Callable[..., Part]:
    listener = type(tiny_ppo().listener)
    return lambda **options: lora_part(tiny_language, listener(stop_at=options.pop("stop_at", None)), **options)


def run_lora(part: Part, uri: Path) -> Made:
    return train_once(part, str(uri), {GROUP: 1e-2}, 2)


@pytest.fixture(scope="module")
def lora_made(new_lora: Callable[..., Part], tmp_path_factory: pytest.TempPathFactory) -> tuple[Made, Path]:
    folder = tmp_path_factory.mktemp("lora")
    straight = run_lora(new_lora(), folder / "straight")
    run_lora(new_lora(stop_at=3), folder / "store")
    return straight, folder / "store"


@pytest.fixture
def lora_runs(lora_made: tuple[Made, Path], tmp_path: Path) -> tuple[Made, Path]:
    return lora_made[0], Path(shutil.copytree(lora_made[1], tmp_path / "store"))


def test_the_items_of_a_lora_are_all_tried(new_lora: Callable[..., Part], lora_runs: tuple[Made, Path]) -> None:
    straight, store = lora_runs
    manifest = Store.open(str(store)).latest_state("run", "stage")
    assert manifest is not None
    assert manifest.values["source"] == {}
    assert set(manifest.tensors) == set(STATE_GROUPS)
    for entry in manifest.tensors["param"]:
        assert sum(part in entry.name for part in LORA_PARTS) == 1, entry.name
    assert run_lora(new_lora(), store) == straight


@pytest.mark.parametrize("item", [*(f"loop {name}" for name in LOOP), *items(LORA_PARTS), "engine steps_applied"])
def test_leaving_an_item_of_a_lora_out_is_noticed(
    new_lora: Callable[..., Part], lora_runs: tuple[Made, Path], monkeypatch: pytest.MonkeyPatch, item: str
) -> None:
    straight, store = lora_runs
    part = new_lora()
    leave_out(monkeypatch, item, part.source.state())
    assert run_lora(part, store) != straight


def test_a_resume_on_another_base_is_noticed(new_lora: Callable[..., Part], lora_runs: tuple[Made, Path]) -> None:
    """The base is no part of the state: it comes in by its digest, which is in the stage's fingerprint."""
    straight, store = lora_runs
    assert run_lora(new_lora(base_seed=1), store) != straight


def test_dropout_follows_from_the_step(new_lora: Callable[..., Part], tmp_path: Path) -> None:
    """Without its noise another adapter comes out: the exact resume above is one of dropout, too."""
    noisy = run_lora(new_lora(), tmp_path / "noisy")
    silent = new_lora()
    for module in silent.engine.module.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert run_lora(silent, tmp_path / "silent") != noisy
