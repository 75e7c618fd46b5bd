"""Where in the schema a path of a recipe lies: the model in charge, its valid keys, pydantic's locations as paths."""

import json
import re
import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, Discriminator, Tag
from pydantic.fields import FieldInfo

from recipes.fields import TagAt
from recipes.places import Path, value_at
from recipes.recipe import Recipe

Loc = tuple[int | str, ...]


@dataclass(frozen=True)
class Slot:
    """What is allowed at one place: a model, a tagged union of slots, a container of `items`, or a plain value."""

    model: type[BaseModel] | None = None
    members: dict[str, "Slot"] = field(default_factory=dict)
    """Of a union: its slots by tag; a member may be a union by another tag."""
    tag: TagAt | None = None
    """Where a value of the union says which member it is; its path is empty where the tag itself is a key."""
    items: Any = None
    choices: tuple[Any, ...] = ()

    @property
    def is_union(self) -> bool:
        return self.tag is not None

    @cached_property
    def models(self) -> tuple[type[BaseModel], ...]:
        """Every model that is allowed here."""
        found = [model for member in self.members.values() for model in member.models]
        return tuple(dict.fromkeys(found if self.model is None else [self.model, *found]))

    @cached_property
    def item(self) -> "Slot":
        """The slot of each item of a container."""
        return _describe(self.items)

    def member_for(self, value: Any) -> "Slot | None":
        """The union's member that the value's own tag selects."""
        if self.tag is None or not isinstance(value, dict):
            return None
        if not self.tag.path:
            return next((member for tag, member in self.members.items() if tag in value), None)
        tag = self.tag(value)
        return self.members.get(tag) if tag is not None else None

    def model_for(self, value: Any) -> type[BaseModel] | None:
        """The model that the value's own tags select."""
        if not self.is_union:
            return self.model
        member = self.member_for(value)
        return member.model_for(value) if member is not None else None


ROOT = Slot(model=Recipe)


@cache
def describe_field(info: FieldInfo) -> Slot:
    """The slot of a model's field; `check` goes through all of them several times."""
    return _describe(info.annotation, _first_tag([info, *info.metadata]))


def _first_tag(metadata: Iterable[Any]) -> TagAt | None:
    return next((found for item in metadata if (found := _tag_of(item)) is not None), None)


def _tag_of(item: Any) -> TagAt | None:
    """Where a discriminator among a type's metadata finds a value's tag."""
    found = item.discriminator if isinstance(item, FieldInfo) else item
    if isinstance(found, Discriminator):
        found = found.discriminator
        if not isinstance(found, str):
            return found if isinstance(found, TagAt) else TagAt(())
    return TagAt((found,)) if isinstance(found, str) else None


def _describe(annotation: Any, tag: TagAt | None = None) -> Slot:
    if get_origin(annotation) is Annotated:
        inner, *metadata = get_args(annotation)
        return _describe(inner, _first_tag(metadata) or tag)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return Slot(model=annotation)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        members = [member for member in arguments if member is not type(None)]
        if tag is not None:
            return Slot(members=_tagged(members, tag), tag=tag)
        if len(members) == 1:
            return _describe(members[0])
        return Slot(choices=tuple(choice for member in members for choice in _describe(member).choices))
    if origin is dict:
        return Slot(items=arguments[1])
    if origin in (list, tuple):
        return Slot(items=arguments[0])
    return Slot(choices=arguments if origin is Literal else ())


def _tagged(members: list[Any], tag: TagAt) -> dict[str, Slot]:
    """The members by their tags: written as `Tag`, or as the values of each model's own field."""
    slots: dict[str, Slot] = {}
    for member in members:
        slot = _describe(member)
        metadata = get_args(member)[1:] if get_origin(member) is Annotated else ()
        tags = [item.tag for item in metadata if isinstance(item, Tag)]
        for model in slot.models if not tags else ():
            tags += [str(value) for value in get_args(model.model_fields[tag.path[0]].annotation)]
        slots.update(dict.fromkeys(tags, slot))
    return slots


@cache
def model_keys(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """The model's fields by the key that is written in a recipe."""
    return {info.alias or name: info for name, info in model.model_fields.items()}


def slot_at(path: Path, raw: Any) -> Slot | None:
    """The slot at a path of the recipe's plain data; None where the schema has no such place."""
    slot, value = ROOT, raw
    for part in path:
        if slot.models:
            model = slot.model_for(value)
            info = model_keys(model).get(str(part)) if model is not None else None
            if info is None:
                return None
            slot = describe_field(info)
        elif slot.items is not None:
            slot = slot.item
        else:
            return None
        value = _child(value, part)
    return slot


def field_at(path: Path, raw: Any) -> FieldInfo | None:
    """The declaration of the key at a path, if a model declares it."""
    parent = slot_at(path[:-1], raw) if path else None
    value = raw
    for part in path[:-1]:
        value = _child(value, part)
    model = parent.model_for(value) if parent is not None else None
    return model_keys(model).get(str(path[-1])) if model is not None else None


def _child(value: Any, part: int | str) -> Any:
    if isinstance(value, dict):
        return value.get(part)
    if isinstance(value, list) and isinstance(part, int) and 0 <= part < len(value):
        return value[part]
    return None


@dataclass(frozen=True)
class Place:
    """Where pydantic found an error: the path in the recipe's text, and what is allowed there."""

    path: Path
    slot: Slot

    @property
    def tag_path(self) -> Path:
        """Where the tag of the union at this place is written."""
        return self.path if self.slot.tag is None else (*self.path, *self.slot.tag.path)


def path_of(loc: Loc) -> Path:
    """The path in the recipe's text that pydantic's error location means (tags and union labels left out)."""
    return place_of(loc).path


def place_of(loc: Loc) -> Place:
    """The place that pydantic's error location means."""
    slot, path = ROOT, []
    for part in loc:
        if slot.is_union:
            member = slot.members.get(str(part))
            if member is None:
                break
            slot = member
            continue
        if slot.model is not None:
            info = model_keys(slot.model).get(str(part))
            path.append(part)
            slot = describe_field(info) if info is not None else Slot()
        elif slot.items is not None:
            path.append(part)
            slot = slot.item
        else:
            break
    return Place(tuple(path), slot)


def alternatives(choices: Sequence[str]) -> str:
    """What is allowed at a place as a list of words; anything but words is quoted."""
    choices = [choice if re.match(r"[\w-]", choice) else json.dumps(choice) for choice in choices]
    return (
        choices[0]
        if len(choices) == 1
        else ", ".join(choices[:-1]) + " or " + choices[-1]
        if choices
        else "another value"
    )


def key_elsewhere(key: str, model: type[BaseModel], prefix: str = "", depth: int = 4) -> str | None:
    """The dotted place below the model where the key is valid, for example `train.optimizer.lr`."""
    if depth == 0:
        return None
    for name, info in model_keys(model).items():
        for child in describe_field(info).models:
            if key in model_keys(child):
                return f"{prefix}{name}.{key}"
    for name, info in model_keys(model).items():
        for child in describe_field(info).models:
            found = key_elsewhere(key, child, f"{prefix}{name}.", depth - 1)
            if found is not None:
                return found
    return None


def other_tags(place: Path, raw: Any, tag: str | None = None) -> str:
    """Says under which other tags above a place of the recipe's plain data its key is valid; "" where there are none.

    With `tag`: under which a value of that tag is. Kinds of stage are no such tags.
    """
    for depth in range(len(place) - 1, 0, -1):
        slot, value = slot_at(place[:depth], raw), value_at(raw, place[:depth])
        while slot is not None and slot.tag is not None:
            path = slot.tag.path
            if path and path != ("kind",) and isinstance(value_at(value, path[:-1]), dict):
                fitting = []
                for name in slot.members:
                    changed = _written(raw, (*place[:depth], *path), name)
                    there = slot_at(place, changed)
                    if field_at(place, changed) is not None if tag is None else there and tag in there.members:
                        fitting.append(name)
                if fitting:
                    return f"belongs to {'.'.join(path)}: {alternatives(fitting)}"
            slot = slot.member_for(value)
    return ""


def _written(raw: Any, path: Path, value: Any) -> Any:
    """The plain data with another value at a path; only what lies on the way is copied."""
    if not path:
        return value
    (key, *rest), copy = path, raw.copy()
    copy[key] = _written(value_at(raw, (key,)), tuple(rest), value)
    return copy
