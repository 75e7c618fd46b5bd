"""pydantic's errors as problems with a place, a plain sentence and what would be right."""

import re
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from recipes.errors import FieldFinding, Finding, Problem
from recipes.fields import FieldError, FieldsError
from recipes.loading.schema_paths import (
    Place,
    Slot,
    alternatives,
    describe_field,
    field_at,
    key_elsewhere,
    model_keys,
    other_tags,
    place_of,
    slot_at,
)
from recipes.loading.yaml_text import Document
from recipes.nearest import nearest
from recipes.places import Path, mark_of, path_text, shown, value_at
from recipes.problem_codes import Code


def schema_problems(error: ValidationError, document: Document, path: FilePath) -> list[Problem]:
    """pydantic's errors as problems; what the members of a union report about one value becomes one problem."""
    by_field: dict[str, Problem] = {}
    between_fields = []
    for detail, problem in located_problems(error, document, path):
        first = by_field.get(problem.field)
        if detail["type"] == "value_error" and isinstance(detail["input"], dict):
            between_fields.append(problem)
        elif first is None:
            by_field[problem.field] = problem
        elif problem.message not in first.message:
            code = problem.code if first.code == Code.UNKNOWN_CHOICE else first.code
            by_field[problem.field] = replace(first, code=code, message=f"{first.message}, or {problem.message}")
    return [*by_field.values(), *between_fields]


def located_problems(error: ValidationError, document: Document, path: FilePath) -> list[tuple[ErrorDetails, Problem]]:
    located = []
    for detail in error.errors(include_url=False):
        at = place_of(detail["loc"])
        place = at.tag_path if detail["type"] in _TAG_ERRORS else at.path
        mark = mark_of(place, document.marks, path)
        found = "" if detail["type"] in ("missing", "union_tag_not_found") else shown(value_at(document.value, place))
        if detail["type"] == "value_error" and isinstance(value_at(document.value, place), dict):
            found = ""
        if detail["type"] == "value_error" and isinstance(error_at := detail["ctx"]["error"], FieldsError):
            located += [(detail, _problem_at(place, item, document, path)) for item in error_at.located]
            continue
        for finding in _findings(detail, at, document.value):
            code, message, suggestion = finding
            located.append((detail, Problem(code, mark.file, mark.line, path_text(place), found, message, suggestion)))
    return located


def _problem_at(model: Path, item: FieldFinding, document: Document, path: FilePath) -> Problem:
    """The problem of a key of a model, found by the model's own check."""
    place = (*model, *item.field_path.split("."))
    mark, (code, message, suggestion) = mark_of(place, document.marks, path), item.finding
    found = "" if item.found == "" else shown(item.found)
    return Problem(code, mark.file, mark.line, path_text(place), found, message, suggestion)


_TAG_ERRORS = ("union_tag_invalid", "union_tag_not_found")
_TYPES = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping of keys to values",
    "model_type": "must be a mapping of keys to values",
    "model_attributes_type": "must be a mapping of keys to values",
    "finite_number": "must be finite",
}


_CODES = {
    "extra_forbidden": Code.UNKNOWN_KEY,
    "missing": Code.MISSING_KEY,
    "union_tag_not_found": Code.MISSING_KEY,
    "union_tag_invalid": Code.UNKNOWN_CHOICE,
    "literal_error": Code.UNKNOWN_CHOICE,
    "string_pattern_mismatch": Code.INVALID_FORMAT,
    "greater_than": Code.OUT_OF_RANGE,
    "greater_than_equal": Code.OUT_OF_RANGE,
    "less_than": Code.OUT_OF_RANGE,
    "less_than_equal": Code.OUT_OF_RANGE,
    "finite_number": Code.OUT_OF_RANGE,
    "too_short": Code.WRONG_LENGTH,
    "too_long": Code.WRONG_LENGTH,
    "string_too_short": Code.WRONG_LENGTH,
    "string_too_long": Code.WRONG_LENGTH,
}
"""pydantic's types of error; every other one is about the type of a value."""


def _findings(detail: ErrorDetails, at: Place, raw: Any) -> tuple[Finding, ...]:
    """What one of pydantic's errors says: one thing, or all that a check between fields has found."""
    if detail["type"] == "value_error":
        error = detail["ctx"]["error"]
        assert isinstance(error, FieldError), f"validators of the schema raise FieldError, not {error!r}"
        findings: tuple[Finding, ...] = error.findings
        return findings
    return (Finding(_CODES.get(detail["type"], Code.WRONG_TYPE), *_explain(detail, at, raw)),)


def _explain(detail: ErrorDetails, at: Place, raw: Any) -> tuple[str, str]:
    """The message and the suggestion for one of pydantic's errors."""
    kind, context, place = detail["type"], detail.get("ctx", {}), at.path
    info = field_at(place, raw)
    if kind == "extra_forbidden":
        return _explain_unknown(place, raw)
    if kind == "missing":
        return "the key is required", f"{place[-1]}: {info.description}" if info is not None else ""
    if kind == "literal_error":
        slot = slot_at(place, raw)
        choices = [str(choice) for choice in slot.choices] if slot is not None else []
        expected = [word.strip("'") for word in re.split(r", | or ", str(context["expected"]))]
        found = place[-1] if detail["loc"][-1] == "[key]" else detail["input"]
        message, suggestion = _explain_choice(found, choices or expected)
        return message, suggestion or (info.description or "" if info is not None else "")
    if kind == "union_tag_invalid":
        message, suggestion = _explain_choice(context["tag"], _writable_tags(at.slot))
        return message, suggestion or other_tags(place, raw, tag=context["tag"])
    if kind == "union_tag_not_found":
        return "the key is required", "one of " + ", ".join(at.slot.members)
    if kind == "string_pattern_mismatch":
        return f"does not match {context['pattern']}", info.description or "" if info is not None else ""
    if kind in _TYPES:
        suggestion = info.description or "" if info is not None else ""
        if kind in ("int_type", "float_type", "int_from_float") and isinstance(detail["input"], str):
            number = detail["input"].replace(",", "").replace(" ", "")
            if re.fullmatch(r"[-+]?[0-9_.]+([eE][-+]?[0-9]+)?", number):
                suggestion = f"write {number} without quotes"
        if kind == "bool_type" and str(detail["input"]).lower() in ("yes", "on", "no", "off", "y", "n"):
            suggestion = "write true" if str(detail["input"]).lower() in ("yes", "on", "y") else "write false"
        if "mapping" in _TYPES[kind] and at.slot.model is not None:
            keys = "its keys: " + ", ".join(model_keys(at.slot.model))
            suggestion = f"{suggestion} {keys[0].upper()}{keys[1:]}" if suggestion else keys
        return _TYPES[kind], suggestion
    message = detail["msg"][0].lower() + detail["msg"][1:]
    message = message.removeprefix("input should be ").removeprefix("input should ").replace(" after validation", "")
    suggestion = info.description or "" if info is not None else ""
    return f"must be {message}" if detail["msg"].startswith("Input should be") else message, suggestion


def _writable_tags(slot: Slot) -> list[str]:
    """The tags of a union that can be written; one may mean that the tag is absent."""
    key = slot.tag.path[0] if slot.tag is not None and slot.tag.path else None
    return [
        tag
        for tag, member in slot.members.items()
        if key is None or all(key in model_keys(model) for model in member.models)
    ]


def _key_of_section(key: str, model: type[BaseModel]) -> str | None:
    """`section.key` where a key joins the two by an underscore, as in critic_lr; None: no section has it."""
    for section, info in model_keys(model).items():
        inner = key.removeprefix(f"{section}_")
        if inner != key and any(inner in model_keys(child) for child in describe_field(info).models):
            return f"{section}.{inner}"
    return None


def _explain_choice(found: Any, choices: list[str]) -> tuple[str, str]:
    guess = nearest(str(found), choices)
    return "must be " + alternatives(choices), f"did you mean {guess}?" if guess is not None else ""


def _explain_unknown(place: Path, raw: Any) -> tuple[str, str]:
    key = str(place[-1])
    parent = slot_at(place[:-1], raw)
    model = parent.model_for(value_at(raw, place[:-1])) if parent is not None else None
    if model is None:
        return "unknown key", ""
    keys = list(model_keys(model))
    belongs = other_tags(place, raw)
    if belongs:
        return "unknown key", belongs
    if (inside := _key_of_section(key, model)) is not None:
        return "unknown key", f"did you mean {inside}?"
    guess = nearest(key, keys)
    elsewhere = key_elsewhere(key, model)
    if guess is not None and (elsewhere is None or guess.lower() == key.lower()):
        return "unknown key", f"did you mean {guess}?"
    if elsewhere is not None:
        return "unknown key", f"did you mean {elsewhere}?"
    forms = parent.members if parent is not None else {}
    if key in forms:
        return "unknown key", f"give {alternatives(list(forms))}, not both"
    if fitting := [form for form, member in forms.items() if any(key in model_keys(each) for each in member.models)]:
        return "unknown key", f"belongs to {alternatives(fitting)}"
    for depth in range(len(place) - 2, -1, -1):
        around = slot_at(place[:depth], raw)
        outer = around.model_for(value_at(raw, place[:depth])) if around is not None else None
        if outer is not None and key in model_keys(outer):
            return "unknown key", f"did you mean {path_text((*place[:depth], key))}?"
        if outer is not None and (elsewhere := key_elsewhere(key, outer)) is not None:
            return "unknown key", f"did you mean {path_text((*place[:depth], elsewhere))}?"
    return "unknown key", "valid here: " + ", ".join(keys)
