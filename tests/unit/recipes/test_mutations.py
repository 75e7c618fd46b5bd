"""Every field of every shipped recipe, changed in turn: wrong type, out of range, unknown key, key taken away."""

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from recipes.fields import TagAt
from recipes.loading.load import check_file, dump_recipe, load_recipe
from recipes.loading.schema_paths import Slot, field_at, slot_at

RECIPES = Path(__file__).parents[3] / "recipes"
SHIPPED = sorted(RECIPES.glob("*.yaml")) + sorted(RECIPES.glob("*/*.yaml"))
UNBOUNDED = {"min", "max"}
"""A gate's bounds are any number."""
FREE_KEYS = {("columns",), ("rank_pattern",), ("alpha_pattern",)}
"""Mappings whose keys are the user's: columns, patterns of module names."""
SIGNED = {"weight"}
"""A term of a reward may be a penalty."""

FieldPath = tuple[str | int, ...]
Fields = Callable[[], dict[Path, list[tuple[FieldPath, Any]]]]


def _leaves(value: Any, path: FieldPath = ()) -> Iterator[tuple[FieldPath, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    elif isinstance(value, list) and value:
        yield path, value
        for index, item in enumerate(value):
            yield from _leaves(item, (*path, index))
    else:
        yield path, value


def _mappings(value: Any, path: FieldPath = ()) -> Iterator[FieldPath]:
    if isinstance(value, dict):
        yield path
        for key, item in value.items():
            yield from _mappings(item, (*path, key))


def _wrong_types(value: Any) -> list[Any]:
    wrong: list[Any] = [[[1]]]
    if isinstance(value, bool):
        wrong += ["maybe"]
    elif isinstance(value, int | float):
        wrong += ["many", True]
    elif isinstance(value, str):
        wrong += [1.5]
    elif isinstance(value, list):
        wrong += ["word"]
    return wrong


def _refusals(path: Path, place: FieldPath, value: Any) -> list[str]:
    dotted = ".".join(str(part) for part in place)
    _, problems = check_file(path, [f"{dotted}={json.dumps(value)}"])
    return [
        problem.field
        for problem in problems
        if problem.field == dotted or dotted.startswith(problem.field + ".") or problem.field.startswith(dotted + ".")
    ]


@functools.cache
def _dumped(path: Path) -> dict[str, Any]:
    """The recipe with every default written out."""
    return dump_recipe(load_recipe(path).recipe)


def _fields(path: Path) -> list[tuple[FieldPath, Any]]:
    """The recipe's fields; `columns` and `stages` take keys of the user's."""
    return [(place, value) for place, value in _leaves(_dumped(path)) if place]


@functools.cache
def _first_shown() -> dict[Path, list[tuple[FieldPath, Any]]]:
    """The fields of each recipe that no recipe before it has, with a value of that type."""
    seen: set[tuple[int, bool, type]] = set()
    found: dict[Path, list[tuple[FieldPath, Any]]] = {path: [] for path in SHIPPED}
    for path in SHIPPED:
        for place, value in _fields(path):
            names = place[:-1] if isinstance(place[-1], int) else place
            declared = field_at(names, _dumped(path))
            key = (id(declared), names != place, type(value))
            if declared is None or key not in seen:
                found[path].append((place, value))
            seen.add(key)
    return found


EVERY = pytest.mark.parametrize(
    "fields", [_first_shown, pytest.param(None, marks=pytest.mark.long)], ids=["new", "all"]
)
"""A field is declared once, in whatever recipes it stands; the long tier changes it in each of them."""


@pytest.fixture(params=SHIPPED, ids=lambda path: path.stem)
def shipped(request: pytest.FixtureRequest) -> Path:
    assert isinstance(request.param, Path)
    return request.param


def test_shipped_recipes_are_right(shipped: Path) -> None:
    for smoke in (False, True):
        assert check_file(shipped, smoke=smoke)[1] == []


@EVERY
def test_a_wrong_type_is_refused(shipped: Path, fields: Fields | None) -> None:
    accepted = [
        (place, wrong)
        for place, value in (_fields(shipped) if fields is None else fields()[shipped])
        for wrong in _wrong_types(value)
        if not _refusals(shipped, place, wrong)
    ]
    assert accepted == []


@EVERY
def test_a_number_out_of_range_is_refused(shipped: Path, fields: Fields | None) -> None:
    accepted = [
        (place, wrong)
        for place, value in (_fields(shipped) if fields is None else fields()[shipped])
        if isinstance(value, int | float) and not isinstance(value, bool) and place[-1] not in UNBOUNDED
        for wrong in (*([] if place[-1] in SIGNED else [-1]), 10**30 if isinstance(value, int) else 1e30)
        if not _refusals(shipped, place, wrong)
    ]
    assert accepted == []


def _surplus_keys(path: Path) -> list[str]:
    """An undeclared key, in every mapping of a recipe."""
    places = [place for place in _mappings(_dumped(path)) if place != ("stages",) and place[-1:] not in FREE_KEYS]
    return [".".join(str(part) for part in (*place, "surplus_key")) for place in places]


def test_unknown_keys_are_refused(shipped: Path) -> None:
    """All at once, with a problem in each mapping that has one: the key, or the tag that a mapping also needs."""
    surplus = _surplus_keys(shipped)
    _, problems = check_file(shipped, [f"{dotted}=1" for dotted in surplus])
    mappings, named = (
        {field.rpartition(".")[0] for field in fields} for fields in (surplus, [problem.field for problem in problems])
    )
    assert mappings - named == set()


@pytest.mark.long
def test_an_unknown_key_is_refused(shipped: Path) -> None:
    accepted = []
    for dotted in _surplus_keys(shipped):
        _, problems = check_file(shipped, [f"{dotted}=1"])
        if not any(problem.field.startswith(dotted.removesuffix("surplus_key")) for problem in problems):
            accepted.append(dotted)
    assert accepted == []


def tags_of(slot: Slot | None) -> Iterator[TagAt]:
    """Where the unions at a place, one within another, say which member stands there."""
    if slot is not None and slot.tag is not None:
        yield slot.tag
        for member in slot.members.values():
            yield from tags_of(member)


def is_tag_with_default(place: tuple[Any, ...], raw: Any) -> bool:
    """Whether a key only says which member of a union stands there, and its absence says it, too."""
    return any(
        tag.default is not None and (*place[:length], *tag.path) == place
        for length in range(len(place))
        for tag in tags_of(slot_at(place[:length], raw))
    )


def test_a_required_key_that_is_taken_away_is_named(shipped: Path, tmp_path: Path) -> None:
    raw = dump_recipe(load_recipe(shipped).recipe)
    unnamed = []
    for place, _ in _leaves(raw):
        info = field_at(place, raw)
        if info is None or not info.is_required() or is_tag_with_default(place, raw):
            continue
        changed = json.loads(json.dumps(raw))
        parent = changed
        for part in place[:-1]:
            parent = parent[part]
        del parent[place[-1]]
        copy = tmp_path / "recipe.yaml"
        copy.write_text(json.dumps(changed))
        _, problems = check_file(copy)
        dotted = ".".join(str(part) for part in place)
        if not any(dotted == problem.field or dotted.startswith(problem.field + ".") for problem in problems):
            unnamed.append(dotted)
    assert unnamed == []
