"""From another system's file to a recipe: its keys through its table, then its defaults, then arithmetic."""

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from recipes.convert.assemble import assemble, assemble_part
from recipes.convert.command_line import COMMAND
from recipes.convert.draft import Draft, Line
from recipes.convert.quantities import NODES, ROWS, WORKERS
from recipes.convert.rules import Choice, Entry, Outcome, Place, Rule, Section, Table, no_effect
from recipes.convert.source_text import SourceFile
from recipes.convert.system import System
from recipes.errors import RequestError
from recipes.nearest import nearest
from recipes.problem_codes import Code

NOT_SET = no_effect("has no value")


@dataclass(frozen=True, slots=True)
class Conversion:
    """A recipe of another system's files, and what became of each of their keys."""

    systems: list[System]
    recipe: dict[str, Any]
    """Of files that are only part of a configuration: keys of a stage."""
    draft: Draft

    @property
    def is_whole(self) -> bool:
        """Whether it is a recipe."""
        return any(system.is_whole for system in self.systems)

    @property
    def title(self) -> str:
        """The systems, as people write them."""
        return " + ".join(dict.fromkeys(system.title for system in self.systems))

    @property
    def refused(self) -> list[Line]:
        """Keys that no recipe can say."""
        return self.draft.of(Outcome.REFUSED)


def convert(
    sources: Sequence[tuple[SourceFile, System]],
    recipe_dir: Path,
    *,
    workers: int | None = None,
    rows: int | None = None,
    without: Sequence[str] = (),
) -> Conversion:
    """Convert a configuration, and files that are part of one, such as how it is sharded.

    `workers` is the number of GPUs that it was written for, `rows` that of the training data's rows, `without` names
    keys to leave out. Raises RequestError where two files are whole configurations, or `without` names a key that none
    has.
    """
    sources = sorted(sources, key=lambda pair: not pair[1].is_whole)
    if len(whole := [source.name for source, system in sources if system.is_whole]) > 1:
        raise RequestError(f"{' and '.join(whole)} are whole configurations; one is converted at a time")
    main, system = sources[0]
    draft = Draft(system.title, main.name, main.marks, main.working_dir, recipe_dir)
    if workers is not None:
        draft.values[WORKERS], draft.decided = workers, frozenset({WORKERS, NODES})
    sources = [(flattened(source) if one.is_flat else source, one) for source, one in sources]
    main = sources[0][0]
    if rows is not None:
        draft.values[ROWS] = rows
    kept = _left_out([source.value for source, _ in sources], without, draft)
    later: list[tuple[Section, Any, Place]] = []
    for (source, one), value in zip(sources, kept, strict=True):
        draft.system, draft.file, draft.marks = one.title, source.name, source.marks
        enter(one.table, value, draft, (), later)
    draft.system, draft.file, draft.marks = system.title, main.name, main.marks
    draft.reading_defaults = True
    there = {system.former_names.get(key, key) for key, value in main.value.items() if value is not None}
    run = str(main.value.get(COMMAND, system.kind_of(main.value)))
    by_command = system.command_defaults.get(run, system.defaults)
    defaults = {
        key: value
        for key, value in by_command.items()
        if value is not None and not {key, system.unless.get(key)} & there
    }
    enter(system.table, defaults, draft, (), later)
    draft.reading_defaults = False
    system.finish(draft)
    for section, value, place in later:
        section.convert(value, draft, place)
    made = assemble(draft, Path(main.name).stem) if system.is_whole else assemble_part(draft)
    return Conversion([one for _, one in sources], made, draft)


def flattened(source: SourceFile) -> SourceFile:
    """The file with keys inside mappings named by their path with dots, as Hydra's overrides are."""
    value: dict[str, Any] = {}
    marks = dict(source.marks)

    def add(mapping: Mapping[str, Any], at: Place) -> None:
        for key, item in mapping.items():
            here = (*at, str(key))
            if isinstance(item, Mapping) and item:
                add(item, here)
                continue
            name = ".".join(map(str, here))
            value[name] = item
            if here in source.marks:
                marks[(name,)] = source.marks[here]

    add(source.value, ())
    return replace(source, value=value, marks=marks)


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
        case Section(waits=True) if later is not None:
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


def _left_out(values: Sequence[Mapping[str, Any]], names: Sequence[str], draft: Draft) -> list[dict[str, Any]]:
    """The files without the keys that are to be left out, each named by its path with dots."""
    kept = [dict(value) for value in values]
    for name in names:
        if not any(_take(value, name, draft, ()) for value in kept):
            guess = nearest(name, [key for value in kept for key in value])
            raise RequestError(f"--without {name}: no such key" + (f"; did you mean {guess}?" if guess else ""))
    return kept


def _take(value: dict[str, Any], name: str, draft: Draft, at: Place) -> bool:
    """Take a key out of a mapping; whether it is there."""
    if name in value:
        draft.lines.append(Line((*at, name), value.pop(name), Outcome.LEFT_OUT))
        return True
    key, dot, inner = name.partition(".")
    if not dot or not isinstance(value.get(key), Mapping):
        return False
    value[key] = dict(value[key])
    return _take(value[key], inner, draft, (*at, key))
