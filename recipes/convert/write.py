"""A converted recipe as text: YAML that people read on, and what became of each key, as comments at its end (pure)."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from recipes.convert.draft import Line
from recipes.convert.engine import Conversion
from recipes.convert.rules import Outcome
from recipes.loading.yaml_text import scalar

_PLAIN = re.compile(r"[A-Za-z0-9_./][A-Za-z0-9_./@:+-]*")
WIDTH = 120
SHOWN = (Outcome.REFUSED, Outcome.LEFT_OUT, Outcome.CHANGED, Outcome.NO_EFFECT, Outcome.CARRIED)
"""The order in which outcomes are listed."""


def recipe_text(conversion: Conversion, source: str) -> str:
    """The recipe with a comment at each computed value, and every key of the file at the end."""
    title = conversion.title
    lines = [f"# Converted from {_one_line(source)} ({title}) by `trainwright convert`."]
    if not conversion.is_whole:
        lines.append(
            "# Keys of a stage, not a recipe: a configuration that names a model and data, and this, make one."
        )
    comments = {f"stages.*.{target}": text for target, text in conversion.draft.comments.items()}
    lines += [] if conversion.recipe else ["{}"]
    lines += _mapping(conversion.recipe, 0, (), comments)
    lines += ["", f"# What became of the keys of {title}:"]
    lines += [f"#   {line}" if line else "#" for line in report_lines(conversion)]
    return "\n".join(lines) + "\n"


def report_lines(conversion: Conversion, outcomes: Sequence[Outcome] = SHOWN) -> list[str]:
    """What became of each key, by outcome; keys that have no effect for one reason share a line."""
    lines: list[str] = []
    for outcome in outcomes:
        found = conversion.draft.of(outcome)
        if not found:
            continue
        lines.append(f"{outcome}:")
        lines += [
            f"  {_one_line(text)}" for text in (_grouped(found) if outcome is Outcome.NO_EFFECT else map(str, found))
        ]
    return lines


def _grouped(lines: Sequence[Line]) -> Iterator[str]:
    by_reason: dict[str, list[str]] = {}
    for line in lines:
        by_reason.setdefault(line.reason, []).append(line.key)
    for reason, keys in by_reason.items():
        yield f"{', '.join(dict.fromkeys(keys))}: {reason}"


def _one_line(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)


def _mapping(value: dict[str, Any], depth: int, path: tuple[str, ...], comments: dict[str, str]) -> Iterator[str]:
    indent = "  " * depth
    for key, item in value.items():
        here = (*path, key)
        comment = comments.get(".".join(("stages", "*", *here[2:]) if here[0] == "stages" and len(here) > 2 else here))
        said = f"  # {_one_line(comment)}" if comment else ""
        if isinstance(item, dict) and item and not _fits(key, item, indent):
            yield f"{indent}{_scalar(key)}:{said}"
            yield from _mapping(item, depth + 1, here, comments)
        else:
            yield f"{indent}{_scalar(key)}: {_flow(item)}{said}"


def _fits(key: str, item: dict[str, Any], indent: str) -> bool:
    """Whether a mapping of plain values is written in one line."""
    if any(isinstance(inner, dict) for inner in item.values()):
        return False
    return len(item) <= 4 and len(f"{indent}{key}: {_flow(item)}") <= WIDTH and indent != ""


def _flow(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_scalar(key)}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return _scalar(value)


def _scalar(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return _number(value)
    try:
        is_plain = _PLAIN.fullmatch(value) is not None and not value.endswith(":") and scalar(value) == value
    except ValueError:
        is_plain = False
    return value if is_plain else json.dumps(value, ensure_ascii=False)


def _number(value: int | float) -> str:
    text = f"{value:.12g}" if isinstance(value, float) and float(f"{value:.12g}") == value else repr(value)
    mantissa, exponent, power = text.partition("e")
    return f"{mantissa}e{int(power)}" if exponent else text
