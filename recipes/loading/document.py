"""A recipe with what is needed to talk about it: the place of every value, and problems that name it."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

from recipes.errors import FieldFinding, Finding, Problem
from recipes.loading.yaml_text import Mark, Path, path_text, shorten
from recipes.problem_codes import Code
from recipes.recipe import Recipe
from recipes.references import Reference
from recipes.stages.kinds import Stage


@dataclass(frozen=True)
class UnsoundStage:
    """A stage that has errors of its own, with those of its fields that have none."""

    stage: Stage | None
    """Without its other fields; None where not even its kind is known."""
    wrong: frozenset[str] = frozenset()
    """Names of the fields that it lacks."""


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe, its file, its plain data and the place of every value."""

    recipe: Recipe
    path: FilePath
    sources: dict[Path, Mark]
    raw: dict[str, Any]
    smoke: bool = False
    unsound: Mapping[str, UnsoundStage] = field(default_factory=dict)
    """Stages that have errors of their own, by name (only while errors are being collected)."""
    configs: Mapping[Reference, Mapping[str, Any]] = field(default_factory=dict)
    """`config.json` of the models of the store and the hub, by reference (only once they have been looked up)."""

    @property
    def base_dir(self) -> FilePath:
        """The folder at which the recipe's relative paths start."""
        return self.path.parent

    def stages_with(self, *fields: str) -> Iterator[tuple[str, Stage]]:
        """Every stage of whose given fields none is wrong; the others of its fields may not be there."""
        yield from self.recipe.stages.items()
        for name, unsound in self.unsound.items():
            if unsound.stage is not None and unsound.wrong.isdisjoint(fields):
                yield name, unsound.stage

    def problem(self, code: Code, path: str | Path, found: Any, message: str, suggestion: str = "") -> Problem:
        """A problem at a field path, with the file and line of that field or of the nearest one around it."""
        parts = parse_path(path) if isinstance(path, str) else path
        mark = mark_of(parts, self.sources, self.path)
        value = "" if found == "" else shown(found)
        return Problem(code, mark.file, mark.line, path_text(parts), value, message, suggestion)

    def problem_from(self, finding: Finding, path: str | Path, found: Any) -> Problem:
        """A rule's finding as a problem at a field path."""
        return self.problem(finding.code, path, found, finding.message, finding.suggestion)

    def problems(self, stage: str, findings: Iterable[FieldFinding]) -> Iterator[Problem]:
        """Findings at fields of a stage as problems."""
        for field_path, found, finding in findings:
            yield self.problem_from(finding, f"stages.{stage}.{field_path}", found)

    def is_written(self, stage: str, field_path: str) -> bool:
        """Whether the recipe's text holds a field of a stage."""
        return parse_path(f"stages.{stage}.{field_path}") in self.sources


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
