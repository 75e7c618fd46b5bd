"""Every key of the quickstart, and every name that it chooses among, misspelt in turn: named and put right."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from recipes.loading.load import check_file
from recipes.loading.yaml_text import parse_yaml

RECIPES = Path(__file__).parents[3] / "recipes"
TAGS = ("kind", "family", "type", "source", "architecture", "train", "algorithm", "init_from")
"""Keys without which nothing below them can be checked."""

FieldPath = tuple[str | int, ...]


def _quickstart() -> Any:
    return parse_yaml((RECIPES / "quickstart.yaml").read_bytes(), "quickstart.yaml").value


def _keys(value: Any, place: FieldPath = ()) -> Iterator[FieldPath]:
    """Keys of the schema; stages and terms of a reward have names of the user's."""
    if isinstance(value, dict):
        for key, item in value.items():
            if place[-1:] not in (("stages",), ("rewards",)):
                yield (*place, key)
            yield from _keys(item, (*place, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _keys(item, (*place, index))


def _misspellings(word: str) -> list[str]:
    """A letter left out, two letters swapped, a letter doubled."""
    middle = len(word) // 2
    dropped = word[:middle] + word[middle + 1 :]
    swapped = word[: middle - 1] + word[middle] + word[middle - 1] + word[middle + 1 :]
    doubled = word[: middle + 1] + word[middle:]
    return [wrong for wrong in (dropped, swapped, doubled) if wrong not in ("", word)]


def _parent(raw: Any, place: FieldPath) -> Any:
    for part in place[:-1]:
        raw = raw[part]
    return raw


def _told(path: Path, raw: Any, field: str, suggestion: str) -> bool:
    path.write_text(json.dumps(raw, indent=1))
    _, problems = check_file(path)
    return any(
        problem.field == field and suggestion in problem.suggestion and problem.line is not None for problem in problems
    )


def test_every_misspelt_key_is_named(tmp_path: Path) -> None:
    places = list(_keys(_quickstart()))
    assert len(places) > 120
    unnamed = []
    for number, place in enumerate(places):
        right = str(place[-1])
        wrongs = _misspellings(right)
        for wrong in wrongs if right in TAGS else wrongs[number % len(wrongs) :][:1]:
            raw = _quickstart()
            parent = _parent(raw, place)
            items = [(wrong if key == right else key, value) for key, value in parent.items()]
            parent.clear()
            parent.update(items)
            dotted = ".".join(str(part) for part in (*place[:-1], wrong))
            if not _told(tmp_path / "recipe.yaml", raw, dotted, f"did you mean {right}?"):
                unnamed.append(dotted)
    assert unnamed == []


def test_every_misspelt_choice_is_named(tmp_path: Path) -> None:
    unnamed = []
    for place in _keys(_quickstart()):
        if place[-1] not in (*TAGS, "name", "actor", "reward") or place == ("name",):
            continue
        right = _parent(_quickstart(), place)[place[-1]]
        for wrong in _misspellings(right) if isinstance(right, str) else ():
            raw = _quickstart()
            _parent(raw, place)[place[-1]] = wrong
            dotted = ".".join(map(str, place))
            if not _told(tmp_path / "recipe.yaml", raw, dotted, f"did you mean {right}?"):
                unnamed.append(f"{dotted}={wrong}")
    assert unnamed == []


def test_what_stands_below_a_misspelt_key_is_checked_too(tmp_path: Path) -> None:
    raw = _quickstart()
    stage = raw["stages"]["base"]
    stage["knid"] = stage.pop("kind")
    stage["architecure"] = {**stage.pop("architecture"), "hiden_size": 3}
    stage["train"]["steps"] = -1
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(raw, indent=1))
    _, problems = check_file(path)
    fields = {problem.field for problem in problems}
    assert {"stages.base.knid", "stages.base.architecure", "stages.base.architecture.hiden_size"} <= fields
    assert "stages.base.train.steps" in fields


@pytest.mark.parametrize("wrong", ["extnds", "extend", "extennds"])
def test_a_misspelt_extends_is_named_and_followed(wrong: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{wrong}: {RECIPES / 'quickstart.yaml'}\nname: mine\n")
    _, problems = check_file(path)
    assert [(problem.field, problem.line, problem.suggestion) for problem in problems] == [
        (wrong, 1, "did you mean extends?")
    ]


def test_a_misspelt_key_with_a_default_is_named(tmp_path: Path) -> None:
    raw = parse_yaml((RECIPES / "image" / "captions_ddpo.yaml").read_bytes(), "captions_ddpo.yaml").value
    base = parse_yaml((RECIPES / "image" / raw.pop("extends")).read_bytes(), "base").value
    raw["stages"] = base["stages"] | raw["stages"]
    assert raw["stages"]["policy"]["algorithm"].pop("name") == "ddpo"
    raw["stages"]["policy"]["algorithm"]["nmae"] = "ddpo"
    assert _told(tmp_path / "recipe.yaml", raw, "stages.policy.algorithm.nmae", "did you mean name?")


def test_another_name_of_a_key_is_known_by_its_value(tmp_path: Path) -> None:
    """Read as the key that it stands for: nothing is said about the keys of the algorithm that it names."""
    path = tmp_path / "recipe.yaml"
    raw = _quickstart()
    raw["stages"]["policy"] = {
        "kind": "rl",
        "actor": "base",
        "reward": {"rule": "ink"},
        "rollout": {"images_per_iteration": 8},
        "algorithm": {"method": "ddpo", "iterations": 2, "grid": 10, "optimizer": {"lr": 1e-3}},
    }
    path.write_text(json.dumps(raw, indent=1))
    _, problems = check_file(path)
    found = {(problem.code, problem.field, problem.suggestion) for problem in problems}
    assert ("unknown-key", "stages.policy.algorithm.method", "did you mean name?") in found
    assert [field for code, field, _ in found if code in ("unknown-key", "wrong-type")] == [
        "stages.policy.algorithm.method"
    ]
