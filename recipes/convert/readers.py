"""Readers of values: what a recipe's field takes from another system's, numbers written as text included."""

import contextlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from recipes.convert.rules import Reader, Unfit
from recipes.places import shown
from recipes.problem_codes import Code


def const(value: Any) -> Reader:
    """The same value, whatever is written."""
    return lambda _: value


def number(value: Any) -> float | int:
    """A number; PyYAML leaves `1e-4` as text."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value) if re.search(r"[.eE]", value) else int(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or abs(value) == float("inf"):
        raise Unfit("must be a number", Code.WRONG_TYPE)
    return value


def whole(value: Any) -> int:
    """A whole number."""
    found = number(value)
    if found != int(found):
        raise Unfit("must be a whole number", Code.WRONG_TYPE)
    return int(found)


def positive(value: Any) -> int:
    """A whole number from 1 on."""
    found = whole(value)
    if found < 1:
        raise Unfit("must be at least 1", Code.OUT_OF_RANGE)
    return found


def real(value: Any) -> float:
    """A number as a float."""
    return float(number(value))


def share(value: Any) -> float:
    """A share from 0 to below 1."""
    found = float(number(value))
    if not 0 <= found < 1:
        raise Unfit("is a number of rows; a recipe takes a share of the rows, below 1", Code.OUT_OF_RANGE)
    return found


def pair(value: Any) -> list[float]:
    """Two numbers."""
    if not isinstance(value, list) or len(value) != 2:
        raise Unfit("must be two numbers", Code.WRONG_TYPE)
    return [real(item) for item in value]


def text(value: Any) -> str:
    """Text that is not empty."""
    if not isinstance(value, str) or not value.strip():
        raise Unfit("must be text", Code.WRONG_TYPE)
    return value.strip()


def truth(value: Any) -> bool:
    """True or false."""
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise Unfit("must be true or false", Code.WRONG_TYPE)
    return value


def reversed_truth(value: Any) -> bool:
    """The opposite."""
    return not truth(value)


def texts(value: Any) -> list[str]:
    """A list of texts; one text may list them with commas."""
    found = [part for part in re.split(r"[,\s]+", value) if part] if isinstance(value, str) else value
    if not isinstance(found, list) or not found or not all(isinstance(part, str) for part in found):
        raise Unfit("must be a list of texts", Code.WRONG_TYPE)
    return found


def as_listed(value: Any) -> list[str]:
    """A list of texts as it is."""
    if not isinstance(value, list) or not value or not all(isinstance(part, str) for part in value):
        raise Unfit("must be a list of texts", Code.WRONG_TYPE)
    return value


def shares(value: Any) -> list[float]:
    """Positive numbers; one text may list them with commas."""
    written = [part for part in value.split(",") if part.strip()] if isinstance(value, str) else value
    found = [real(part) for part in written] if isinstance(written, list) else []
    if not found or min(found) <= 0:
        raise Unfit("must be a list of numbers above 0", Code.OUT_OF_RANGE)
    return found


def one_of(names: Mapping[str, Any]) -> Callable[[Any], Any]:
    """What one of several names means."""

    def read(value: Any) -> Any:
        if not isinstance(value, str) or value not in names:
            raise Unfit("must be one of " + ", ".join(names), Code.UNKNOWN_CHOICE)
        return names[value]

    return read


def lora_targets(value: Any) -> list[str] | str:
    """Names of modules, or a pattern of their paths; `all` and `all-linear` mean every linear one but the head."""
    if isinstance(value, str) and value in ("all", "all-linear", "all_linear"):
        return "all-linear"
    if isinstance(value, str) and not re.fullmatch(r"[A-Za-z0-9_.,\s]+", value):
        try:
            re.compile(value)
        except re.error as error:
            raise Unfit(f"is neither a list of names nor a regular expression ({error})") from None
        return value
    return module_names(value)


def module_names(value: Any) -> list[str]:
    """Names of modules, or ends of their paths."""
    names = texts(value)
    if wrong := next((name for name in names if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.]*", name)), None):
        raise Unfit(f"{shown(wrong)} is a pattern; in a list each is the end of a path")
    return list(dict.fromkeys(names))
