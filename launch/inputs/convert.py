"""A configuration of another system, converted and checked as far as its models and data are there."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.inputs.data_check import DataCheck
from recipes.convert.engine import Conversion, convert
from recipes.convert.registry import find_system, recognise
from recipes.convert.source_text import read_source
from recipes.convert.write import SHOWN, recipe_text
from recipes.errors import Problem, RecipeError, RequestError
from recipes.loaded_recipe import LoadedRecipe
from recipes.loading.load import check_text
from recipes.problem_codes import Code
from recipes.references import HubRef, parse_reference

NOT_THERE = (Code.MISSING_FILE, Code.MISSING_FOLDER, Code.INPUT_NOT_FOUND)
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
        told = f" (by {', '.join(self.recognised_by[:3])})" if self.recognised_by else ""
        return (
            f"{self.conversion.system.title}{told}: {', '.join(text for text in counts if not text.startswith('0 '))}"
        )

    def to_json(self) -> dict[str, Any]:
        """The stable `--json` form."""
        lines = self.conversion.draft.lines
        return {
            "system": self.conversion.system.name,
            "recipe": self.text,
            "keys": [
                {"key": line.key, "outcome": line.outcome.name.lower(), "target": line.target, "reason": line.reason}
                for line in lines
                if not line.is_default
            ],
            "problems": [problem.to_json() for problem in self.problems],
            "missing": self.missing,
        }


def convert_file(
    file: Path,
    output: Path | None = None,
    *,
    system: str | None = None,
    workers: int | None = None,
    working_dir: Path = Path("."),
    without: Sequence[str] = (),
) -> Converted:
    """Convert a file, write the recipe to `output` where no key is refused, and check it.

    Raises RecipeError for a file that cannot be read, RequestError where its system is not known.
    """
    source = read_source(file, working_dir)
    found, told = (find_system(system), []) if system is not None else recognise(source.value, str(file))
    recipe_path = output or working_dir / f"{file.stem}.recipe.yaml"
    conversion = convert(source, found, recipe_path.parent, workers=workers, without=without)
    if not found.is_whole:
        lacking = "it says how a stage is sharded, not what it trains; name it in the configuration that does"
        raise RequestError(f"{file}: is a file of {found.title}: {lacking}")
    if conversion.refused:
        problems = [conversion.draft.describe(line) for line in conversion.refused]
        return Converted(conversion, told, None, problems)
    text = recipe_text(conversion, str(file))
    if output is not None:
        output.write_text(text, encoding="utf-8")
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
