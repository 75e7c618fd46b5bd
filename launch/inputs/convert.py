"""A configuration of another system, converted and checked as far as its models and data are there."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from launch.inputs.data_check import DataCheck
from recipes.convert.command_line import COMMAND
from recipes.convert.engine import Conversion, convert
from recipes.convert.registry import find_system, recognise
from recipes.convert.source_text import SourceFile, read_source
from recipes.convert.system import System
from recipes.convert.write import SHOWN, recipe_text
from recipes.errors import Problem, RecipeError, RequestError
from recipes.loaded_recipe import LoadedRecipe
from recipes.loading.load import check_text
from recipes.problem_codes import Code
from recipes.references import HubRef, parse_reference

NOT_THERE = (Code.MISSING_FILE, Code.MISSING_FOLDER, Code.INPUT_NOT_FOUND, Code.MISSING_REWARD_FUNCTION)
"""Problems that end once models and data are where the recipe says."""


@dataclass(frozen=True, slots=True)
class Converted:
    """What came of a file."""

    conversion: Conversion
    recognised_by: list[str]
    """Keys that told the system; empty where the user did."""
    text: str | None
    """The recipe; None where a key is refused."""
    problems: list[Problem] = field(default_factory=list)
    """Refused keys, else what `check` says of the recipe."""
    missing: list[str] = field(default_factory=list)
    """Models and data that are to be fetched or put in place."""

    @property
    def exit_code(self) -> int:
        """2 where a key is refused or the recipe is wrong."""
        return RecipeError.exit_code if self.problems else 0

    @property
    def summary(self) -> str:
        """The system and how many keys came to what."""
        counts = [f"{len(self.conversion.draft.of(outcome))} {outcome}" for outcome in SHOWN]
        told = f" (by {', '.join(self.recognised_by)})" if self.recognised_by else ""
        return f"{self.conversion.title}{told}: {', '.join(text for text in counts if not text.startswith('0 '))}"

    def to_json(self) -> dict[str, Any]:
        """The stable `--json` form."""
        lines = self.conversion.draft.lines
        return {
            "systems": [system.name for system in self.conversion.systems],
            "recipe": self.text,
            "keys": [
                {"key": line.key, "outcome": line.outcome.name.lower(), "target": line.target, "reason": line.reason}
                for line in lines
                if not line.is_default
            ],
            "problems": [problem.to_json() for problem in self.problems],
            "missing": self.missing,
        }


def convert_files(
    files: Sequence[Path],
    output: Path | None = None,
    *,
    system: str | None = None,
    workers: int | None = None,
    rows: int | None = None,
    working_dir: Path = Path("."),
    without: Sequence[str] = (),
) -> Converted:
    """Convert files that are one configuration, write the recipe to `output` where no key is refused, and check it.

    `system` is that of the first file. Raises RecipeError for a file that cannot be read, RequestError where its system
    is not known, or a folder is not there.
    """
    for folder, option in ((working_dir, "--folder"), (Path() if output is None else output.parent, "-o")):
        if not folder.is_dir():
            raise RequestError(f"{option}: there is no folder {folder}")
    sources: list[tuple[SourceFile, System]] = []
    told: list[str] = []
    for index, file in enumerate(files):
        source = read_source(file, working_dir)
        if system is not None and index == 0:
            name, _, command = system.partition(":")
            found, keys = find_system(name), list[str]()
            source = replace(source, value={COMMAND: command, **source.value}) if command else source
        else:
            found, keys = recognise(source.value, str(file))
        sources.append((source, found))
        told += keys[:3]
    recipe_path = output or working_dir / f"{files[0].stem}.recipe.yaml"
    conversion = convert(sources, recipe_path.parent, workers=workers, rows=rows, without=without)
    if conversion.refused:
        return Converted(conversion, told, None, [conversion.draft.describe(line) for line in conversion.refused])
    text = recipe_text(conversion, ", ".join(map(str, files)))
    if output is not None:
        output.write_text(text, encoding="utf-8")
    if not conversion.is_whole:
        return Converted(conversion, told, text, missing=["a configuration that names a model and data"])
    loaded, problems = check_text(text, recipe_path, DataCheck())
    missing = [str(problem) for problem in problems if problem.code in NOT_THERE]
    missing += [] if loaded is None else [*_remote(loaded)]
    return Converted(conversion, told, text, [found for found in problems if found.code not in NOT_THERE], missing)


def _remote(loaded: LoadedRecipe) -> list[str]:
    """Models and data of the hub, which `check` has not looked at."""
    found: list[str] = []
    for name, stage in loaded.recipe.stages.items():
        for item in stage.inputs():
            if isinstance(parse_reference(item.text), HubRef):
                found.append(f"stages.{name}.{item.field_path}: {item.text} is fetched when the run starts")
        for use in stage.sources():
            revision = getattr(use.source, "revision", None)
            if revision is not None and not use.is_derived:
                path = getattr(use.source, "path", "")
                found.append(f"stages.{name}.{use.field_path}: {path}@{revision} is fetched when the run starts")
    return found
