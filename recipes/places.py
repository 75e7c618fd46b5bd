"""Places in a recipe: the path of a value, its file and line, and how both are shown."""

import re
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Mark:
    """The place of a value: its file and line (None for a command-line value)."""

    file: str
    line: int | None


def path_text(path: Path) -> str:
    """A field path as people write it: `stages.base.of.0`."""
    return ".".join(str(part) if str(part).isprintable() else repr(part) for part in path)


def shorten(value: Any, limit: int = 80) -> str:
    """A value as it would be written, cut to a readable length."""
    text = value if isinstance(value, str) else _plain(value)
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _plain(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_plain(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_plain(item) for item in value) + "]"
    return str(value) if not isinstance(value, str) else value


def parse_path(dotted: str) -> Path:
    """A dotted field path as its parts; whole numbers are places in a list."""
    return tuple(int(part) if re.fullmatch(r"0|[1-9][0-9]{0,5}", part) else part for part in dotted.split("."))


def mark_of(path: Path, marks: dict[Path, Mark], file: FilePath) -> Mark:
    """The mark of the path, or of the nearest place around it."""
    while path not in marks:
        if not path:
            return Mark(str(file), None)
        path = path[:-1]
    return marks[path]


def value_at(raw: Any, path: Path) -> Any:
    """The value at a path of plain data; None where there is none."""
    for part in path:
        is_item = isinstance(raw, list) and isinstance(part, int) and part < len(raw)
        if not is_item and not (isinstance(raw, dict) and part in raw):
            return None
        raw = raw[part]
    return raw


def shown(value: Any) -> str:
    """A value as a message shows it: text in quotes, cut to a readable length."""
    if isinstance(value, str):
        return shorten(f"'{value}'")
    return shorten(value)
