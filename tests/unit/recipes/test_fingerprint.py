"""What enters a fingerprint, and what does not."""

from collections.abc import Callable
from pathlib import Path

import pytest

from recipes.loading.load import load_recipe
from recipes.planning.fingerprint import ParentId, fingerprint
from recipes.planning.smoke import shrink

Write = Callable[..., Path]
DATA = {"data": "data digest", "evaluation": "evaluation digest"}


def _fingerprint(path: Path, stage: str, *overrides: str, parent: str = "p", data: dict[str, str] | None = None) -> str:
    recipe = load_recipe(path, overrides).recipe
    parents = {item.field_path: ParentId(parent, "digest") for item in recipe.stages[stage].inputs()}
    return fingerprint(stage, recipe, parents, DATA if data is None else data)


def test_it_is_64_hex_digits_and_stable(write_recipe: Write) -> None:
    made = _fingerprint(write_recipe(), "chat")
    assert len(made) == 64
    assert set(made) <= set("0123456789abcdef")
    assert made == _fingerprint(write_recipe(), "chat")


@pytest.mark.parametrize(
    "override",
    [
        "stages.chat.train.optimizer.lr=2e-3",
        "stages.chat.train.steps=21",
        "stages.chat.lora.r=4",
        "stages.chat.lora=null",
        "stages.chat.seed=9",
        "seed=4",
        "stages.chat.shard.precision=bf16",
        "stages.chat.data.part=1/2",
        "stages.chat.loss_on=all",
    ],
)
def test_meaning_changes_it(override: str, write_recipe: Write) -> None:
    path = write_recipe()
    assert _fingerprint(path, "chat", override) != _fingerprint(path, "chat")


@pytest.mark.parametrize(
    "override",
    [
        "name=other",
        "cluster.workers=1",
        "cluster.max_retries=0",
        "stages.chat.shard.zero=3",
        "stages.chat.shard.engine=plain",
        "stages.chat.shard.micro_batch=2",
        "stages.chat.shard.gradient_checkpointing=true",
        "stages.chat.train.save_every=3",
        "stages.chat.train.evaluate_every=3",
        "stages.chat.gate=ignore",
        "stages.chat.seed=3",
        "stages.base.train.steps=null",
        "stages.judge.center_coefficient=0.5",
    ],
)
def test_placement_and_other_stages_do_not(override: str, write_recipe: Write) -> None:
    path = write_recipe(("{workers: 2, min_workers: 1}", "{workers: 1}"))
    assert _fingerprint(path, "chat", override) == _fingerprint(path, "chat")


def test_parents_and_data_change_it(write_recipe: Write) -> None:
    path = write_recipe()
    made = _fingerprint(path, "chat")
    assert _fingerprint(path, "chat", parent="q") != made
    assert _fingerprint(path, "chat", data={**DATA, "data": "other"}) != made


def test_neither_the_stage_name_nor_where_inputs_lie_is_meaning(write_recipe: Write) -> None:
    path = write_recipe()
    names = [("  chat:\n", "  talk:\n"), ("of: [chat,", "of: [talk,")]
    names += [(f"{key}: chat", f"{key}: talk") for key in ("init_from", "actor")]
    renamed = write_recipe(*names, name="renamed.yaml")
    assert _fingerprint(renamed, "talk") == _fingerprint(path, "chat")
    (path.parent / "moved.jsonl").write_bytes((path.parent / "rows" / "chat.jsonl").read_bytes())
    assert _fingerprint(path, "chat", "stages.chat.data.files=[moved.jsonl]") == _fingerprint(path, "chat")


def test_the_smoke_form_is_another_thing(write_recipe: Write) -> None:
    recipe = load_recipe(write_recipe()).recipe
    parents = {"init_from": ParentId("p", "d")}
    assert fingerprint("chat", shrink(recipe), parents, DATA) != fingerprint("chat", recipe, parents, DATA)


def test_parents_must_be_the_stage_s_inputs(write_recipe: Write) -> None:
    recipe = load_recipe(write_recipe()).recipe
    with pytest.raises(ValueError, match="init_from"):
        fingerprint("chat", recipe, {}, DATA)
