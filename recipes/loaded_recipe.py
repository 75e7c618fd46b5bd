"""A recipe with what is needed to talk about it: the place of every value, and problems that name it."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

from recipes.errors import FieldFinding, Finding, Problem
from recipes.places import Mark, Path, mark_of, parse_path, path_text, shown
from recipes.problem_codes import Code
from recipes.recipe import Recipe
from recipes.references import Reference
from recipes.stages.kinds import Stage


@dataclass(frozen=True)
class UnsoundStage:
    """A stage with errors in its own fields, and those of its fields without."""

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
    """Stages with errors in their own fields, by name (only while errors are being collected)."""
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
