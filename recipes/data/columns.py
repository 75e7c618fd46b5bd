"""Columns of rows: which ones a role needs, and whether a file's have them with values of the right kind (pure)."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from recipes.errors import Finding
from recipes.loading.schema_paths import nearest
from recipes.problem_codes import Code
from recipes.stages.base import Role

FORMS: dict[Role, tuple[tuple[str, ...], ...]] = {
    "text": (("text",), ("prompt", "completion")),
    "instructions": (("messages",), ("prompt", "completion"), ("text",)),
    "labels": (("text",),),
    "seq2seq": (("messages",), ("prompt", "completion")),
    "preferences": (("chosen", "rejected"),),
    "prompts": (("prompt",), ("messages",)),
    "images": (),
}
"""Standard columns of each role: one of the alternatives must be there."""
COLUMNS = frozenset(column for forms in FORMS.values() for form in forms for column in form)


def check_columns(file: str, names: list[str], columns: Mapping[Any, str], role: Role) -> Iterator[Finding]:
    """The mapped columns are there, and one of the role's forms is whole."""
    is_whole = True
    for standard, own in columns.items():
        if own not in names:
            is_whole = False
            guess = nearest(own, names)
            suggestion = f"did you mean {guess}?" if guess else "columns there: " + ", ".join(names[:12])
            yield Finding(Code.MISSING_COLUMN, f"{file}: no column {own!r} (mapped to {standard})", suggestion)
    standard_names = {standard for standard in COLUMNS if columns.get(standard, standard) in names}
    if "conversations" in names:
        standard_names.add("messages")
    if is_whole and not any(set(form) <= standard_names for form in FORMS[role]):
        needed = " or ".join(" and ".join(form) for form in FORMS[role])
        there = "columns there: " + ", ".join(names[:12])
        yield Finding(Code.MISSING_COLUMN, f"{file}: needs {needed}", f"{there}; map them with `columns`")


def check_row(place: str, row: dict[str, Any], columns: Mapping[Any, str], role: Role) -> Iterator[Finding]:
    """The columns of one row, and the kinds of what stands in them."""
    yield from check_columns(place, list(row), columns, role)
    for form in FORMS[role]:
        if all(columns.get(column, column) in row for column in form):
            for column in form:
                own = columns.get(column, column)
                if not _fits(row[own], column):
                    expected = "text" if column == "text" else "a list of messages with role and content"
                    expected = expected if column in ("text", "messages") else f"text or {expected}"
                    message = f"{place}: {own} must be {expected}, not {json.dumps(row[own])[:60]}"
                    yield Finding(Code.WRONG_CELL_TYPE, message)
            return


def _fits(value: Any, column: str) -> bool:
    if isinstance(value, str):
        return column != "messages"
    if column == "text" or not isinstance(value, list) or not value:
        return False
    return all(isinstance(turn, dict) and _is_message(turn) for turn in value)


def _is_message(turn: dict[str, Any]) -> bool:
    """A role (`from` in ShareGPT's form) and content, or something in its place, such as tool calls."""
    role = turn.get("role", turn.get("from"))
    return isinstance(role, str) and any(value for key, value in turn.items() if key not in ("role", "from"))
