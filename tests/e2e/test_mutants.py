"""Shipped recipes with some of their values changed: what the static check accepts runs to its end in the smoke size.

Several changes go into one run, at most two in each stage, drawn by a seed; a failure names them all.
"""

import json
import random
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from recipes.loading.load import check_file, dump_recipe, load_recipe
from recipes.loading.schema_paths import field_at
from recipes.references import StageRef, parse_reference
from tests.e2e.shell import Shell

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
ROUNDS = {"quickstart.yaml": 6, "llm/files.yaml": 2}
"""Runs of a recipe, each with other changes; 1 where it is not named."""
CHANGES_PER_STAGE = 2
LOCAL = ("cluster.workers=2", "cluster.gpus_per_worker=0")
PLACES = (
    "name",
    "cluster",
    "files",
    "path",
    "revision",
    "source",
    "kind",
    "init_from",
    "actor",
    "reward",
    "of",
    "from",
)
"""Fields that say where or what, not how: another value is another recipe."""

ROWS_TELL = ("which no training row has", "distances need 2 held-out images")
"""Refusals for what no check without the rows can know."""

FieldPath = tuple[str | int, ...]


def leaves(value: Any, path: FieldPath = ()) -> Iterator[tuple[FieldPath, Any]]:
    """Every value below, with the way to it."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    else:
        yield path, value


def literals(annotation: Any) -> list[Any]:
    """The values that an annotation lists."""
    if typing.get_origin(annotation) is typing.Literal:
        return list(typing.get_args(annotation))
    return [value for part in typing.get_args(annotation) for value in literals(part)]


def others(value: Any, annotation: Any) -> list[Any]:
    """Other values that a field might take; whether it may is the check's to say."""
    found = [option for option in literals(annotation) if option != value]
    if isinstance(value, bool):
        found.append(not value)
    elif isinstance(value, int):
        found += [1, 2, 3, value + 1, value * 2, max(1, value // 2)]
    elif isinstance(value, float):
        found += [0.0, 0.5, 1.0, value * 2, value / 2]
    elif value is None:
        found += [1, 7, 0.5, "1/2", {"r": 4}, {"r": 4, "dora": True, "target_modules": ["q_proj", "v_proj"]}]
    return [option for option in found if option != value]


def is_accepted(recipe: Path, changes: list[str]) -> bool:
    """Whether the static check has nothing against the changed recipe, in either size."""
    return all(not check_file(recipe, [*LOCAL, *changes], smoke=smoke)[1] for smoke in (False, True))


def draw(recipe: Path, seed: int) -> list[str]:
    """Changes that the check accepts one by one and together."""
    draws = random.Random(f"{recipe.name} {seed}")
    raw = dump_recipe(load_recipe(recipe).recipe)
    fields = [(place, value) for place, value in leaves(raw) if not set(PLACES) & set(place)]
    draws.shuffle(fields)
    taken: list[str] = []
    counts: dict[Any, int] = {}
    for place, value in fields:
        stage = place[1] if place[0] == "stages" else None
        info = field_at(place, raw)
        options = others(value, None if info is None else info.annotation)
        if not options or counts.get(stage, 0) >= CHANGES_PER_STAGE:
            continue
        change = f"{'.'.join(map(str, place))}={json.dumps(draws.choice(options))}"
        if is_accepted(recipe, [*taken, change]):
            taken.append(change)
            counts[stage] = counts.get(stage, 0) + 1
    return taken


def rounds() -> list[tuple[str, int]]:
    """Each shipped recipe whose models are all its own, with a seed for each of its runs."""
    names = [str(path.relative_to(RECIPES)) for path in [*RECIPES.glob("*.yaml"), *sorted(RECIPES.glob("*/*.yaml"))]]
    own = [
        name
        for name in names
        if all(
            isinstance(parse_reference(item.text), StageRef)
            for stage in load_recipe(RECIPES / name).recipe.stages.values()
            for item in stage.inputs()
        )
    ]
    return [(name, seed) for name in own for seed in range(ROUNDS.get(name, 1))]


@pytest.mark.serial
@pytest.mark.long
@pytest.mark.parametrize(("name", "seed"), rounds())
def test_what_the_check_accepts_runs(
    make_shell: Callable[..., Shell], say: Callable[[str], None], name: str, seed: int
) -> None:
    changes = draw(RECIPES / name, seed)
    assert len(changes) >= 2
    say(f"{name}: {'; '.join(changes)}")
    arguments = [part for change in (*LOCAL, *changes) for part in ("--set", change)]
    done = make_shell()("run", str(RECIPES / name), "--smoke", *arguments)
    if done.code == 2 and any(reason in done.err for reason in ROWS_TELL):
        say(f"{name}: {done.err.strip()}")
        return
    assert done.code == 0, f"{' '.join(changes)}\n{done.out}{done.err}"


def test_changes_are_drawn_from_every_stage() -> None:
    drawn = [change for seed in range(2) for change in draw(RECIPES / "quickstart.yaml", seed)]
    assert {change.split(".")[1] for change in drawn if change.startswith("stages.")} >= {
        "base",
        "sft",
        "policy",
        "eval",
    }
