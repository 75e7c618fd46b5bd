"""From another system's file to a recipe: its keys through its table, then its defaults, then arithmetic."""

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.convert.assemble import assemble
from recipes.convert.draft import Draft, Line
from recipes.convert.quantities import WORKERS
from recipes.convert.rules import Choice, Entry, Outcome, Place, Rule, Section, Table, no_effect
from recipes.convert.source_text import SourceFile
from recipes.convert.system import System
from recipes.errors import RequestError
from recipes.nearest import nearest
from recipes.problem_codes import Code

NOT_SET = no_effect("has no value")


@dataclass(frozen=True, slots=True)
class Conversion:
    """A recipe of another system's file, and what became of each of its keys."""

    system: System
    recipe: dict[str, Any]
    draft: Draft

    @property
    def refused(self) -> list[Line]:
        """Keys that no recipe can say."""
        return self.draft.of(Outcome.REFUSED)


def convert(
    source: SourceFile,
    system: System,
    recipe_dir: Path,
    *,
    workers: int | None = None,
    without: Sequence[str] = (),
) -> Conversion:
    """Convert a file; `workers` is the number of GPUs that it was written for, `without` names keys to leave out.

    Raises RequestError where `without` names a key that the file does not have.
    """
    draft = Draft(system.title, source.name, source.marks, source.working_dir, recipe_dir)
    if workers is not None:
        draft.values[WORKERS] = workers
    kept = _leave_out(source.value, list(without), draft)
    later: list[tuple[Section, Any, Place]] = []
    enter(system.table, kept, draft, (), later)
    draft.reading_defaults = True
    defaults = {key: value for key, value in system.defaults.items() if source.value.get(key) is None}
    enter(system.table, defaults, draft, (), later)
    draft.reading_defaults = False
    system.finish(draft)
    for section, value, place in later:
        section.convert(value, draft, place)
    return Conversion(system, assemble(draft, Path(source.name).stem), draft)


def enter(table: Table, mapping: Mapping[str, Any], draft: Draft, at: Place, later: list[Any] | None = None) -> None:
    """Let the entries of a table decide about the keys of a mapping; sections wait in `later` where it is given."""
    for key, value in mapping.items():
        place = (*at, str(key))
        entry = find(table, str(key))
        if value is None or value == {}:
            draft.note(place, None, NOT_SET)
        elif entry is None:
            names = [name for name in table if "*" not in name]
            guess = nearest(str(key), names)
            hint = f"; did you mean {guess}?" if guess else ""
            message = f"is no key of {draft.system} that is known here{hint}"
            draft.reject(place, value, message, Code.UNKNOWN_KEY)
        else:
            _decide(entry, value, draft, place, later)


def _decide(entry: Entry, value: Any, draft: Draft, place: Place, later: list[Any] | None) -> None:
    match entry:
        case Rule():
            draft.note(place, value, entry)
        case Choice():
            known = isinstance(value, str | int | float) and value in entry.cases
            _decide(entry.cases[value] if known else entry.otherwise, value, draft, place, later)
        case Section() if later is not None:
            later.append((entry, value, place))
        case Section():
            entry.convert(value, draft, place)
        case _:
            if isinstance(value, Mapping):
                enter(entry, value, draft, place, later)
            else:
                draft.reject(place, value, "must be a mapping of keys to values", Code.WRONG_TYPE)


def find(table: Table, key: str) -> Entry | None:
    """The entry of a key: its own, or that of the longest pattern that fits."""
    if key in table:
        return table[key]
    patterns = [name for name in table if "*" in name and fnmatch.fnmatchcase(key, name)]
    return table[max(patterns, key=len)] if patterns else None


def _leave_out(value: Mapping[str, Any], without: list[str], draft: Draft, at: Place = ()) -> dict[str, Any]:
    """The mapping without the keys that are to be left out, each named by its path with dots."""
    kept = dict(value)
    for name in without:
        key, _, inner = (name, "", "") if name in kept else name.partition(".")
        if key not in kept or (inner and not isinstance(kept[key], Mapping)):
            guess = nearest(key, list(kept))
            raise RequestError(f"--without {name}: no such key" + (f"; did you mean {guess}?" if guess else ""))
        if inner:
            kept[key] = _leave_out(kept[key], [inner], draft, (*at, key))
        else:
            draft.lines.append(Line((*at, key), kept.pop(key), Outcome.LEFT_OUT))
    return kept
