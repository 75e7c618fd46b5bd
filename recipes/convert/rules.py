"""What becomes of a key of another system: the entries of the tables in `systems/`, one for each key.

A key is carried, carried with a difference, has no effect here, or is refused; each but the first says why.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from recipes.problem_codes import Code

Place = tuple[str | int, ...]
"""The path of a value in the other system's file."""
Reader = Callable[[Any], Any]
"""From a value of the file to the recipe's; raises Unfit."""


class Outcome(StrEnum):
    """What becomes of a key; the value is the heading under which it is listed."""

    CARRIED = "carried"
    CHANGED = "carried with a difference"
    NO_EFFECT = "no effect here"
    REFUSED = "refused"
    LEFT_OUT = "left out as asked"


class Unfit(ValueError):  # noqa: N818
    """A value that the recipe cannot take; says what it must be."""

    def __init__(self, message: str, code: Code = Code.NOT_CONVERTIBLE) -> None:
        super().__init__(message)
        self.code = code


def as_written(value: Any) -> Any:
    """The value as it is."""
    return value


@dataclass(frozen=True, slots=True)
class Rule:
    """What becomes of a key, whatever its value is."""

    outcome: Outcome
    target: str = ""
    """Path in the stage (`train.optimizer.lr`), or a quantity; empty: nothing is written."""
    read: Reader = as_written
    reason: str = ""
    code: Code = Code.NOT_CONVERTIBLE


@dataclass(frozen=True, slots=True)
class Choice:
    """An entry for each value; `otherwise` for the others."""

    cases: "Mapping[Any, Entry]"
    otherwise: "Entry"


@dataclass(frozen=True, slots=True)
class Section:
    """A value that only code can read, such as a list of data sets."""

    convert: Callable[[Any, Any, Place], None]
    """Takes the value, the draft and the value's path."""
    waits: bool = True
    """Whether it is read after every other key."""


Entry = Rule | Choice | Section | Mapping[str, Any]
"""A mapping is the table of the keys of a mapping."""
Table = Mapping[str, Entry]
"""Entries by key; `*` in a key stands for any text, and the longest key that fits counts."""


def carried(target: str, read: Reader = as_written) -> Rule:
    """The recipe says the same."""
    return Rule(Outcome.CARRIED, target, read)


def changed(reason: str, target: str = "", read: Reader = as_written) -> Rule:
    """The recipe says something else, or nothing, and what is trained may differ."""
    return Rule(Outcome.CHANGED, target, read, reason)


def no_effect(reason: str) -> Rule:
    """Nothing that is trained depends on it here."""
    return Rule(Outcome.NO_EFFECT, reason=reason)


def refused(reason: str, code: Code = Code.NOT_CONVERTIBLE) -> Rule:
    """What is trained depends on it, and no recipe can say it."""
    return Rule(Outcome.REFUSED, reason=reason, code=code)


OFF = no_effect("is off")
_NO_FLAG = refused("must be true or false", Code.WRONG_TYPE)


def flag(on: Entry, off: Entry = OFF) -> Choice:
    """An entry for true and one for false; texts that the other systems read as such are read too."""
    return Choice(
        {True: on, False: off, "true": on, "false": off, "True": on, "False": off, "yes": on, "no": off}, _NO_FLAG
    )


def unless(*neutral: Any, then: Entry) -> Choice:
    """Values that ask for nothing, and what becomes of the others."""
    return Choice(dict.fromkeys(neutral, OFF), then)
