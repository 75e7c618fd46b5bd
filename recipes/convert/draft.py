"""A recipe in the making: what the keys of a file came to, and a line for each of them."""

import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from recipes.convert.rules import Outcome, Place, Rule, Unfit
from recipes.errors import Problem
from recipes.places import Mark, path_text, shorten, shown
from recipes.problem_codes import Code

_VARIABLE = re.compile(r"\$[A-Za-z_{0-9(]")


@dataclass(frozen=True, slots=True)
class Line:
    """What became of a key."""

    place: Place
    value: Any
    outcome: Outcome
    target: str = ""
    reason: str = ""
    code: Code = Code.NOT_CONVERTIBLE
    is_default: bool = False
    """Whether the file does not have the key, and the system's default counts."""
    mark: Mark | None = None
    """Where it stands."""

    @property
    def key(self) -> str:
        """The key as people write it."""
        return path_text(self.place)

    def __str__(self) -> str:
        text = self.key if self.value is None else f"{self.key}: {shorten(self.value, 60)}"
        if self.is_default:
            text += " (its default)"
        if self.target and not self.target.startswith("@"):
            text += f" -> {self.target}"
        return f"{text}: {self.reason}" if self.reason else text


@dataclass(slots=True)
class Draft:
    """Values by target, and the lines of the report."""

    system: str
    """The name of the system whose keys are read, as people write it."""
    file: str
    """The file that is read."""
    marks: dict[Place, Mark]
    """Of the file."""
    working_dir: Path
    """Where the other system's relative paths start."""
    recipe_dir: Path
    """Where the recipe's start."""
    values: dict[str, Any] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)
    comments: dict[str, str] = field(default_factory=dict)
    """What is said next to a value of the recipe, by its target."""
    reading_defaults: bool = False
    decided: frozenset[str] = frozenset()
    """Targets that the command line decides."""

    def get(self, target: str, default: Any = None) -> Any:
        """What is written at a target."""
        return self.values.get(target, default)

    def note(self, place: Place, value: Any, rule: Rule) -> None:
        """Apply a rule to a key: write its value, or say why not."""
        if rule.target in self.decided:
            rule = Rule(Outcome.NO_EFFECT, reason="the command line says it")
        line = Line(
            place, value, rule.outcome, rule.target, rule.reason, rule.code, self.reading_defaults, self._mark(place)
        )
        if rule.target and rule.outcome is not Outcome.REFUSED:
            if isinstance(value, str) and _VARIABLE.search(value):
                self.reject(place, value, "holds a variable that the file does not set; write the value")
                return
            try:
                found = rule.read(value)
            except Unfit as error:
                self.reject(place, value, str(error), error.code)
                return
            there = self.values.get(rule.target)
            if there is not None and there != found and "auto" not in (there, found):
                if not self.reading_defaults:
                    message = f"another key says {shown(there)} for the same, {rule.target.lstrip('@')}"
                    self.reject(place, value, message, Code.CONFLICTING_KEYS)
                return
            if there is None or found != "auto":
                self.values[rule.target] = found
        self.lines.append(line)

    def reject(self, place: Place, value: Any, reason: str, code: Code = Code.NOT_CONVERTIBLE) -> None:
        """Refuse a key."""
        mark = self._mark(place)
        self.lines.append(Line(place, value, Outcome.REFUSED, "", reason, code, self.reading_defaults, mark))

    def _mark(self, place: Place) -> Mark:
        while place and place not in self.marks:
            place = place[:-1]
        return self.marks.get(place, Mark(self.file, None)) if place else Mark(self.file, None)

    def retract(self, prefix: str, reason: str) -> None:
        """Take back what was written at targets of a prefix."""
        for target in [target for target in self.values if target.startswith(prefix)]:
            del self.values[target]
        self.lines = [
            replace(line, outcome=Outcome.NO_EFFECT, target="", reason=reason)
            if line.target.startswith(prefix) and line.outcome is not Outcome.REFUSED
            else line
            for line in self.lines
        ]

    def move(self, target: str, to: str) -> None:
        """Write at another target what was written at one, if anything was."""
        if target in self.values:
            self.values[to] = self.values.pop(target)
            self.lines = [replace(line, target=to) if line.target == target else line for line in self.lines]

    def of(self, outcome: Outcome) -> list[Line]:
        """The lines of an outcome, but for defaults that have no effect."""
        is_silent = outcome is Outcome.NO_EFFECT
        return [line for line in self.lines if line.outcome is outcome and not (is_silent and line.is_default)]

    def describe(self, line: Line) -> Problem:
        """A refused key with its place."""
        mark = line.mark or Mark(self.file, None)
        value = "" if line.value is None else shown(line.value)
        code = line.code
        return Problem(code, mark.file, mark.line, line.key, value, line.reason)

    def places(self, written: str) -> list[Path]:
        """Where something that the file names may lie: below the working folder, next to the file, or above it."""
        folder = Path(self.file).resolve().parent
        return [place / written for place in (self.working_dir, folder, *folder.parents)]

    def path(self, written: str) -> str:
        """A path of the other system's as the recipe writes it: it starts with `./`, `../` or `/`."""
        found = Path(written).expanduser()
        if found.is_absolute():
            return str(found)
        path = Path(os.path.relpath(self.working_dir / found, self.recipe_dir)).as_posix()
        return path if path.startswith("..") else f"./{path}"
