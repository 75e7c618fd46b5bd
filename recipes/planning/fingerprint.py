"""The id of what a stage makes: a hash of its meaning, its parents and its data, not of where or on how much it ran."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from recipes.recipe import Recipe
from recipes.stages.kinds import SEMANTICS

FORMAT = 1

MAIN_PARTS = ("model", "actor")
"""Parts that a bare reference means: naming one changes nothing."""

LOCATION_KEYS = ("files", "label_files", "caption_files", "path", "revision", "against")
"""Where a source's rows lie: once they have a digest, their place is no meaning."""


@dataclass(frozen=True, slots=True)
class ParentId:
    """What an input resolved to: the artifact's fingerprint and digest, and the part that is taken."""

    fingerprint: str
    digest: str
    part: str | None = None


def field_role(info: FieldInfo) -> str:
    """`meaning` or `placement`, as the field is marked; raises ValueError for an unmarked one."""
    extra = info.json_schema_extra
    role = extra.get("role") if isinstance(extra, dict) else None
    if role not in ("meaning", "placement"):
        raise ValueError("a recipe field is declared with meaning(...) or placement(...)")
    return str(role)


def _is_left_out(info: FieldInfo, value: Any) -> bool:
    """Whether a field that joined its kind of stage holds what the stage did without it."""
    extra = info.json_schema_extra
    return isinstance(extra, dict) and extra.get("unless_default") is True and bool(value == info.default)


def left_out(model: BaseModel) -> set[str]:
    """Names of fields that joined a part of a recipe and hold what it did without them."""
    return {name for name, info in type(model).model_fields.items() if _is_left_out(info, getattr(model, name))}


def meaning_of(value: Any) -> Any:
    """The part of a recipe value that enters the fingerprint, as JSON data."""
    if isinstance(value, BaseModel):
        further = {} if value.model_extra is None else meaning_of(value.model_extra)
        return further | {
            info.alias or name: meaning_of(getattr(value, name))
            for name, info in type(value).model_fields.items()
            if field_role(info) == "meaning" and not _is_left_out(info, getattr(value, name))
        }
    if isinstance(value, Mapping):
        return {str(key): meaning_of(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [meaning_of(item) for item in value]
    return value


def stage_meaning(
    stage_name: str,
    recipe: Recipe,
    parents: Mapping[str, ParentId],
    data: Mapping[str, str],
    changes: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """What is hashed: readable, so that two fingerprints' differing keys can be named.

    `changes` are settings that were changed while the stage was under way: what comes out is no other run's.
    """
    stage = recipe.stages[stage_name]
    inputs = [item.field_path for item in stage.inputs()]
    missing = sorted(set(inputs) ^ set(parents))
    if missing:
        raise ValueError(f"stage {stage_name}: parents and inputs differ in {', '.join(missing)}")
    settings = meaning_of(stage)
    for field_path in inputs:
        if not field_path.startswith("of."):  # a report names its models as the recipe does
            _drop(settings, field_path)
    for field_path in data:
        _drop_locations(_found(settings, field_path))
    settings["seed"] = stage.seed if stage.seed is not None else recipe.seed
    changed = {"changes": [dict(change) for change in changes]} if changes else {}
    return {
        **changed,
        "format": FORMAT,
        "semantics": SEMANTICS[stage.kind],
        "settings": settings,
        "parents": {
            path: {
                "fingerprint": parent.fingerprint,
                "part": None if parent.part in MAIN_PARTS else parent.part,
            }
            for path, parent in sorted(parents.items())
        },
        "data": dict(sorted(data.items())),
    }


def fingerprint(
    stage_name: str,
    recipe: Recipe,
    parents: Mapping[str, ParentId],
    data: Mapping[str, str],
    changes: Sequence[Mapping[str, Any]] = (),
) -> str:
    """64 hex digits; `parents` by input field path, `data` digests by field path; the stage's name is no meaning."""
    return hash_meaning(stage_meaning(stage_name, recipe, parents, data, changes))


def hash_meaning(meaning: Mapping[str, Any]) -> str:
    """SHA-256 over the canonical JSON form."""
    text = json.dumps(meaning, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _found(settings: Any, field_path: str) -> Any:
    """What stands at a field path; None: a default stands there, which has no place."""
    for part in field_path.split("."):
        settings = settings.get(part) if isinstance(settings, dict) else None
    return settings


def _drop_locations(source: Any) -> None:
    """Replace what says where the rows of a source lie, or of the sources in it, by None."""
    if isinstance(source, list):
        for item in source:
            _drop_locations(item)
    elif isinstance(source, dict):
        for key, value in source.items():
            if key in LOCATION_KEYS:
                source[key] = None
            else:
                _drop_locations(value)


def _drop(settings: Any, field_path: str) -> None:
    """Replace an input's text by None: what it resolved to is among the parents."""
    *outer, last = field_path.split(".")
    for part in outer:
        settings = settings[int(part)] if isinstance(settings, list) else settings[part]
    if isinstance(settings, list):
        settings[int(last)] = None
    else:
        settings[last] = None
