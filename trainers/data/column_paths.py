"""How `columns` names what a row holds: a column, a place inside one, or a text with several in it (pure)."""

import re
from collections.abc import Mapping
from typing import Any

from recipes.nearest import nearest
from recipes.problem_codes import Code
from trainers.data.bad_row import BadRow, columns_of

_STEP = re.compile(r"([^.\[\]]+)|\[(-?\d+)\]")
_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")


def find_value(row: Mapping[str, Any], name: str, written: str) -> tuple[Any, list[str]]:
    """Return what `columns` maps to the standard column `name`, and the row's columns that it comes from.

    `written` is a column; a place inside one, as in `instances[0].output`; or a text with places in braces, as in
    `{instruction}\\n\\n{input}`: an empty place leaves nothing, blanks at both ends are cut, `{{` is a brace. Raises
    BadRow where the row has no such place.
    """
    if written in row:
        return row[written], [written]
    if _PLACEHOLDER.search(written):
        return _fill(row, name, written)
    return _follow(row, name, written)


def _fill(row: Mapping[str, Any], name: str, written: str) -> tuple[str, list[str]]:
    read: list[str] = []

    def place(match: re.Match[str]) -> str:
        if match.group(1) is None:
            return match.group()[0]
        value, columns = _follow(row, name, match.group(1).strip())
        read.extend(columns)
        if value is not None and not isinstance(value, str | int | float):
            raise BadRow(f"{match.group()} (in {name}) is {type(value).__name__}, not text")
        return "" if value is None else str(value)

    return _PLACEHOLDER.sub(place, written).strip(), read


def _follow(row: Mapping[str, Any], name: str, path: str) -> tuple[Any, list[str]]:
    if path in row:
        return row[path], [path]
    steps = [key or int(index) for key, index in _STEP.findall(path)]
    first = str(steps[0]) if steps else path
    if first not in row:
        guess = nearest(first, [str(there) for there in row])
        suggestion = f"did you mean {guess}?" if guess else columns_of(row)
        raise BadRow(f"no column {first!r} (mapped to {name})", suggestion, Code.MISSING_COLUMN)
    value: Any = row
    for number, step in enumerate(steps):
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in steps[:number])[1:]
            what = f"{len(value)} items" if isinstance(value, list) else type(value).__name__
            has = f"there are: {', '.join(map(str, value))}" if isinstance(value, Mapping) else f"it is {what}"
            message = f"{place!r} has no {step!r} ({path!r} is mapped to {name})"
            raise BadRow(message, has, Code.MISSING_COLUMN) from None
    return value, [first]
