"""Misspelt keys that tell the members of a union apart: reported, and read as they were meant.

Without such a key (`kind`, `family`, `type`, `source`, ...) nothing below it can be checked, so it is corrected first:
the one mistake is reported with the right spelling, and everything else of the same stage is still found.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

from recipes.errors import Problem
from recipes.loading.schema_paths import ROOT, Slot, describe_field, model_keys
from recipes.loading.yaml_text import Document
from recipes.nearest import nearest
from recipes.places import Path, mark_of, path_text, shown, value_at
from recipes.problem_codes import Code
from recipes.recipe import Recipe


def correct_tags(document: Document, path: FilePath) -> tuple[Document, list[Problem]]:
    """The document with its misspelt tag keys put right, and a problem for each of them."""
    problems: list[Problem] = []
    while (found := next(_misspelt(document.value, ROOT, ()), None)) is not None:
        document, problem = _corrected(document, *found, path)
        problems.append(problem)
    return document, problems


def correct_extends(document: Document, path: FilePath) -> Document:
    """The document of one file with a misspelt `extends` put right; the problem is among the document's own."""
    keys = {*model_keys(Recipe), "extends"}
    found = None if "extends" in document.value else next(_near(document.value, ["extends"], keys, ()), None)
    if found is None:
        return document
    corrected, problem = _corrected(document, *found, path)
    return replace(corrected, problems=[*document.problems, problem])


def _corrected(document: Document, place: Path, right: str, path: FilePath) -> tuple[Document, Problem]:
    """The document with the last key of a place renamed, and the problem that names it."""
    mark = mark_of(place, document.marks, path)
    found, suggestion, length = shown(value_at(document.value, place)), f"did you mean {right}?", len(place)
    marks = {
        (*place[:-1], right, *known[length:]) if known[:length] == place else known: mark
        for known, mark in document.marks.items()
    }
    problem = Problem(Code.UNKNOWN_KEY, mark.file, mark.line, path_text(place), found, "unknown key", suggestion)
    return replace(document, value=_renamed(document.value, place, right), marks=marks), problem


def _misspelt(value: Any, slot: Slot, place: Path) -> Iterator[tuple[Path, str]]:
    """Every key that is a misspelt tag, with the right spelling, from the outermost on."""
    if isinstance(value, list) and slot.items is not None:
        for index, item in enumerate(value):
            yield from _misspelt(item, slot.item, (*place, index))
    if not isinstance(value, dict):
        return
    inner: Slot | None = slot
    while inner is not None and inner.is_union:
        yield from _misspelt_tag(value, inner, place)
        inner = inner.member_for(value)
    if inner is None:
        return
    keys = {} if inner.model is None else model_keys(inner.model)
    for key, item in value.items():
        if key in keys:
            yield from _misspelt(item, describe_field(keys[key]), (*place, key))
        elif inner.items is not None:
            yield from _misspelt(item, inner.item, (*place, key))


def _misspelt_tag(value: dict[str, Any], union: Slot, place: Path) -> Iterator[tuple[Path, str]]:
    """The misspelt key at which a union's tag should be found, if there is one."""
    assert union.tag is not None
    known = {key for model in union.models for key in model_keys(model)}
    if not union.tag.path:  # the tag is a key by itself
        if not value.keys() & union.members.keys():
            yield from _near(value, list(union.members), known, place)
        return
    instead = [] if union.tag.instead is None else [union.tag.instead[0]]
    if any(key in value for key in instead):
        return
    first, *rest = union.tag.path
    if first not in value:
        yield from _near(value, [first, *instead], known, place)
        return
    below = value[first]
    if rest and isinstance(below, dict) and rest[0] not in below:
        fields = [model_keys(model).get(first) for model in union.models]
        inner = {key for info in fields if info for model in describe_field(info).models for key in model_keys(model)}
        near = [
            *_near(below, rest[:1], inner, (*place, first)),
            *_by_value(below, rest[0], inner, union, (*place, first)),
        ]
        yield from near[:1]


def _by_value(
    value: dict[str, Any], right: str, known: set[str], union: Slot, place: Path
) -> Iterator[tuple[Path, str]]:
    """The unknown key whose value is one of the union's tags: it says which member is meant by another name."""
    for key, item in value.items():
        if key not in known and isinstance(item, str) and item in union.members:
            yield (*place, key), right


def _near(value: dict[str, Any], wanted: list[str], known: set[str], place: Path) -> Iterator[tuple[Path, str]]:
    unknown = [key for key in value if isinstance(key, str) and key not in known]
    for right in wanted:
        guess = nearest(right, unknown)
        if guess is not None:
            yield (*place, guess), right
            return


def _renamed(value: Any, place: Path, right: str) -> Any:
    """The plain data with another name for the last key of a path; only what lies on the way is copied."""
    key, *rest = place
    if not rest:
        return {right if name == key else name: item for name, item in value.items()}
    copy = value.copy()
    copy[key] = _renamed(value[key], tuple(rest), right)
    return copy
