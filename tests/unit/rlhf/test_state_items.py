"""A stop in any step of a PPO or a LoRA changes nothing; whichever item of their state is left out, it shows."""

import contextlib
import shutil
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.errors import StageError
from recipes.stages.lora import Lora
from recipes.stages.optim import AdamW
from recipes.stages.sharding import Shard
from tests.tiers import tiered
from trainers.checkpoint import checkpoint as checkpoint_module
from trainers.checkpoint.loop_state import LoopState
from trainers.data.batches import BatchPlan
from trainers.engine.build import build_engine, parameter_group
from trainers.engine.protocol import STATE_GROUPS
from trainers.models.lora import add_adapter
from trainers.models.token_losses import TokenLosses
from trainers.objectives.language_model import LanguageModelObjective
from trainers.store.store import Store
from trainers.training.steps import GROUP, PlannedBatches

sys.path.insert(0, str(Path(__file__).parent))
from state_items import LOOP, Fatal, Killed, Made, Part, items, leave_out, saved_step, train_once

sys.path.pop(0)

CPU = torch.device("cpu")

# PPO: actor and critic adapters on one network, a value head, an adaptive controller, the best policy so far

PPO_VALUES = ("kl_coef", "start", "best_score", "best_iteration")
PPO_PARTS = (".actor.", ".critic.", "value_head")
PPO_ITERATION = 4
"""Steps: two epochs of two mini-batches."""
PPO_STEPS = 3 * PPO_ITERATION


def ppo_part(build: Callable[..., Any], stop_at: int | None = None, **settings: Any) -> Part:
    controller = {"name": "adaptive", "target": 0.01, "horizon": 50}
    made = build(**{"iterations": 3, "kl_limit": 50.0, "kl_controller": controller, **settings})
    made.listener.stop_at = stop_at
    return Part(made.engine, made.source, made.objective, made.listener)


def run_ppo(part: Part, uri: Path) -> Made:
    return train_once(part, uri, {"actor": 1e-2, "critic": 1e-2}, part.source.steps_per_iteration)


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
    assert {field.name for field in fields(LoopState)} == {*LOOP, "rule", "is_judged"}
    assert set(manifest.tensors) == {*STATE_GROUPS, checkpoint_module.SOURCE_GROUP}
    for entry in manifest.tensors["param"]:
        assert sum(part in entry.name for part in PPO_PARTS) == 1, entry.name
    assert run_ppo(ppo_part(tiny_ppo), store) == straight


@pytest.mark.parametrize("step", tiered(range(PPO_STEPS), (*range(PPO_ITERATION, 2 * PPO_ITERATION), PPO_STEPS - 1)))
def test_a_kill_in_any_step_of_a_ppo_changes_nothing(
    tiny_ppo: Callable[..., Any], ppo_made: tuple[Made, Path], tmp_path: Path, step: int
) -> None:
    """In every mini-batch of every epoch of every iteration: that iteration is done again."""
    killed = ppo_part(tiny_ppo)
    killed.objective = Fatal(killed.objective, killed.listener, step, call=1)
    with pytest.raises(Killed):
        run_ppo(killed, tmp_path)
    assert saved_step(tmp_path) == step // PPO_ITERATION * PPO_ITERATION
    assert run_ppo(ppo_part(tiny_ppo), tmp_path) == ppo_made[0]


@pytest.mark.parametrize("step", [0, 6, 11])
def test_a_ppo_that_is_to_stop_leaves_its_rollouts_and_saves_at_the_end_of_its_updates(
    tiny_ppo: Callable[..., Any], ppo_made: tuple[Made, Path], tmp_path: Path, step: int
) -> None:
    run_ppo(ppo_part(tiny_ppo, stop_at=step), tmp_path)
    assert saved_step(tmp_path) == (step // PPO_ITERATION * PPO_ITERATION + PPO_ITERATION if step else 0)
    assert run_ppo(ppo_part(tiny_ppo), tmp_path) == ppo_made[0]


# GRPO: an adapter alone; groups, and filters that leave some of them out

GRPO: dict[str, Any] = {
    "name": "grpo", "samples": 4, "prompts": 4, "aggregation": "sequences", "drop_equal_groups": True,
    "drop_overlong": True, "kl_coef": 0.1,
}  # fmt: skip
GRPO_ITERATION = 2
"""Steps: one epoch of two mini-batches."""


def run_grpo(part: Part, uri: Path) -> Made:
    return train_once(part, uri, {"actor": 1e-2}, part.source.steps_per_iteration)


@pytest.fixture(scope="module")
def grpo_made(tiny_ppo: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Made:
    return run_grpo(ppo_part(tiny_ppo, **GRPO), tmp_path_factory.mktemp("grpo"))


@pytest.mark.parametrize(
    "step", tiered(range(3 * GRPO_ITERATION), (*range(GRPO_ITERATION, 2 * GRPO_ITERATION), 3 * GRPO_ITERATION - 1))
)
def test_a_kill_or_a_stop_in_any_step_of_a_grpo_changes_nothing(
    tiny_ppo: Callable[..., Any], grpo_made: Made, tmp_path: Path, step: int
) -> None:
    killed = ppo_part(tiny_ppo, **GRPO)
    killed.objective = Fatal(killed.objective, killed.listener, step, call=1)
    with pytest.raises(Killed):
        run_grpo(killed, tmp_path / "killed")
    assert saved_step(tmp_path / "killed") == step // GRPO_ITERATION * GRPO_ITERATION
    run_grpo(ppo_part(tiny_ppo, stop_at=step, **GRPO), tmp_path / "stopped")
    for way in ("killed", "stopped"):
        assert run_grpo(ppo_part(tiny_ppo, **GRPO), tmp_path / way) == grpo_made, way


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
        module,
        [parameter_group(GROUP, module, AdamW(lr=1e-2))],
        Shard(engine="plain", precision="fp32"),
        clip=1.0,
        device=CPU,
    )
    module.train()
    source = PlannedBatches(BatchPlan(language.text(), 0, 8, 1, 0, 4), STEPS)
    return Part(engine, source, LanguageModelObjective(), listener)


@pytest.fixture(scope="module")
def new_lora(tiny_language: Any, tiny_ppo: Callable[..., Any]) -> Callable[..., Part]:
    listener = type(tiny_ppo().listener)
    return lambda **options: lora_part(tiny_language, listener(stop_at=options.pop("stop_at", None)), **options)


def run_lora(part: Part, uri: Path) -> Made:
    return train_once(part, uri, {GROUP: 1e-2}, 2)


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


@pytest.mark.parametrize("step", range(STEPS))
def test_a_stop_in_any_step_of_a_lora_changes_nothing(
    new_lora: Callable[..., Part], lora_made: tuple[Made, Path], tmp_path: Path, step: int
) -> None:
    """Twelve rows in batches of eight: the stops lie in all four epochs. A kill comes with half of the gradients."""
    run_lora(new_lora(stop_at=step), tmp_path / "stopped")
    assert saved_step(tmp_path / "stopped") == step + 1
    killed = new_lora()
    killed.objective = Fatal(killed.objective, killed.listener, step, call=2)
    with pytest.raises(Killed):
        run_lora(killed, tmp_path / "killed")
    assert saved_step(tmp_path / "killed") == step // 2 * 2
    for way in ("stopped", "killed"):
        assert run_lora(new_lora(), tmp_path / way) == lora_made[0], way


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
