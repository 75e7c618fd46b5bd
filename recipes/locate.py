"""Where in the schema a path of a recipe lies: the model in charge, its valid keys, pydantic's locations as paths."""

import difflib
import types
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, Discriminator, Tag
from pydantic.fields import FieldInfo

from recipes.recipe import Recipe
from recipes.yaml_text import Path

Loc = tuple[int | str, ...]


@dataclass(frozen=True)
class Slot:
    """What may stand at one place: one model, a tagged union of models, a container of `items`, or a plain value."""

    models: dict[str, type[BaseModel]] = field(default_factory=dict)
    discriminator: str | None = None
    items: Any = None
    choices: tuple[Any, ...] = ()

    @property
    def is_union(self) -> bool:
        return self.discriminator is not None

    def model_for(self, value: Any) -> type[BaseModel] | None:
        """The model that the value's own tag selects."""
        if not self.is_union:
            return next(iter(self.models.values()), None)
        if not isinstance(value, dict):
            return None
        if self.discriminator == "":
            return next((model for tag, model in self.models.items() if tag in value), None)
        tag = value.get(self.discriminator)
        return self.models.get(tag) if isinstance(tag, str) else None


ROOT = Slot(models={"": Recipe})


def describe_field(info: FieldInfo) -> Slot:
    """The slot of a model's field."""
    tag = info.discriminator
    return _describe(info.annotation, tag if isinstance(tag, str) else "" if isinstance(tag, Discriminator) else None)


def _describe(annotation: Any, discriminator: str | None = None) -> Slot:
    if get_origin(annotation) is Annotated:
        inner, *metadata = get_args(annotation)
        for item in metadata:
            if isinstance(item, FieldInfo) and isinstance(item.discriminator, str):
                discriminator = item.discriminator
            elif isinstance(item, Discriminator):
                discriminator = ""
        return _describe(inner, discriminator)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return Slot(models={"": annotation})
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        members = [member for member in arguments if member is not type(None)]
        if discriminator is not None:
            return Slot(models=_tagged(members, discriminator), discriminator=discriminator)
        if len(members) == 1:
            return _describe(members[0])
        return Slot(choices=tuple(choice for member in members for choice in _describe(member).choices))
    if origin is dict:
        return Slot(items=arguments[1])
    if origin in (list, tuple):
        return Slot(items=arguments[0])
    return Slot(choices=arguments if origin is Literal else ())


def _tagged(members: list[Any], discriminator: str) -> dict[str, type[BaseModel]]:
    models: dict[str, type[BaseModel]] = {}
    for member in members:
        if get_origin(member) is Annotated:
            model, *metadata = get_args(member)
            tag = next(item.tag for item in metadata if isinstance(item, Tag))
            models[tag] = model
        else:
            models.update({str(tag): member for tag in get_args(member.model_fields[discriminator].annotation)})
    return models


@cache
def model_keys(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """The model's fields by the key that is written in a recipe."""
    return {info.alias or name: info for name, info in model.model_fields.items()}


def slot_at(path: Path, raw: Any) -> Slot | None:
    """The slot at a path of the recipe's plain data; None where the schema knows no such place."""
    slot, value = ROOT, raw
    for part in path:
        if slot.models:
            model = slot.model_for(value)
            info = model_keys(model).get(str(part)) if model is not None else None
            if info is None:
                return None
            slot = describe_field(info)
        elif slot.items is not None:
            slot = _describe(slot.items)
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


def path_of(loc: Loc) -> Path:
    """The path in the recipe's text that pydantic's error location means (tags and union labels left out)."""
    slot, path = ROOT, []
    for part in loc:
        if slot.is_union:
            model = slot.models.get(str(part))
            if model is None:
                break
            slot = Slot(models={"": model})
            continue
        if slot.models:
            info = model_keys(slot.models[""]).get(str(part))
            path.append(part)
            slot = describe_field(info) if info is not None else Slot()
        elif slot.items is not None:
            path.append(part)
            slot = _describe(slot.items)
        else:
            break
    return tuple(path)


def nearest(word: str, candidates: list[str]) -> str | None:
    """The candidate that a typing mistake most likely meant."""
    lowered = {candidate.lower(): candidate for candidate in candidates}
    close = difflib.get_close_matches(word.lower().replace("-", "_"), list(lowered), n=1, cutoff=0.6)
    if close:
        return lowered[close[0]]
    inside = [candidate for candidate in candidates if len(word) >= 3 and (word in candidate or candidate in word)]
    return inside[0] if len(inside) == 1 else None


def key_elsewhere(key: str, model: type[BaseModel], prefix: str = "", depth: int = 4) -> str | None:
    """The dotted place below the model where the key is valid, for example `train.optimizer.lr`."""
    if depth == 0:
        return None
    for name, info in model_keys(model).items():
        slot = describe_field(info)
        for child in slot.models.values():
            if key in model_keys(child):
                return f"{prefix}{name}.{key}"
    for name, info in model_keys(model).items():
        for child in describe_field(info).models.values():
            found = key_elsewhere(key, child, f"{prefix}{name}.", depth - 1)
            if found is not None:
                return found
    return None
