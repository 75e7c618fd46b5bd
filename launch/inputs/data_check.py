"""The first rows of a recipe's data, read as training reads them: problems with the recipe's field and line."""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from launch.inputs.reward_check import check_rewards
from recipes.data.images import ImageSetFacts, ImageSource
from recipes.data.text import Source
from recipes.errors import Problem
from recipes.loaded_recipe import LoadedRecipe
from recipes.loading.load import load_recipe
from recipes.models.base import TextFamily
from recipes.problem_codes import Code
from recipes.rules.image_shapes import check_compared_images, check_image_forms
from recipes.rules.models import model_facts
from recipes.rules.reward_tuning import check_reward_tuning
from recipes.stages.answers import INPUT_FIELDS, SOURCE_FIELDS, SourceUse
from recipes.stages.kinds import Stage
from trainers.data.check_source import check_images, check_text, first_images
from trainers.data.images import find_image_set_facts
from trainers.data.row_forms import RowRole, row_role
from trainers.data.sources.reader import SourceError

ANY_FINETUNING: tuple[RowRole, ...] = ("instructions", "labels", "seq2seq")
"""Where the family is not known; rows that name images are for a vision-language model."""


def load_checked(
    path: str | Path, overrides: Sequence[str] = (), smoke: bool = False, forgives: Collection[Code] = ()
) -> LoadedRecipe:
    """Load and check a recipe, its data included; raises RecipeError with everything that is wrong."""
    return load_recipe(path, overrides, smoke, DataCheck(), forgives)


def row_roles(use: SourceUse, family: TextFamily | None) -> tuple[RowRole, ...]:
    """What the rows of a use may be for; the first is the likeliest."""
    if not use.facts.is_tuning:
        return (row_role(use),)
    return ANY_FINETUNING if family is None else (family.tuning_role,)


class DataCheck:
    """Says what is wrong with the data of recipes; each source is read once."""

    def __init__(self) -> None:
        self._errors: dict[tuple[str, Path, tuple[RowRole, ...], tuple[str, ...]], list[SourceError]] = {}
        self._facts: dict[tuple[str, Path], ImageSetFacts | None] = {}

    def __call__(self, loaded: LoadedRecipe) -> list[Problem]:
        """Everything wrong with the sources that the stages read; reported once where several read them."""
        problems = [*self._source_problems(loaded)]
        problems += check_image_forms(loaded, lambda source: self._facts_of(source, loaded.base_dir))
        problems += check_reward_tuning(loaded, lambda source: first_images(source, loaded.base_dir).classes)
        problems += check_compared_images(loaded, lambda source: first_images(source, loaded.base_dir).counts)
        problems += check_rewards(loaded)
        problems += [
            problem
            for name, stage in loaded.stages_with("rollout")
            for problem in loaded.problems(name, stage.missing())
        ]
        return list({(problem.field, problem.message): problem for problem in problems}.values())

    def _source_problems(self, loaded: LoadedRecipe) -> Iterator[Problem]:
        for name, stage in loaded.stages_with(*SOURCE_FIELDS, *INPUT_FIELDS):
            for use in stage.sources():
                if use.is_derived:
                    continue  # rows of the stage's `data`
                for error in self._errors_of(loaded, stage, use):
                    place = f"stages.{name}.{use.field_path}.{error.field}"
                    value = _value(use.source, error.field)
                    yield loaded.problem(error.code, place, value, error.message, error.suggestion)

    def _errors_of(self, loaded: LoadedRecipe, stage: Stage, use: SourceUse) -> list[SourceError]:
        roles = () if use.facts.is_images else row_roles(use, model_facts(loaded, stage).family)
        key = (use.source.model_dump_json(), loaded.base_dir, roles, use.carried)
        if key not in self._errors:
            if use.facts.is_images:
                self._errors[key] = check_images(use.images, loaded.base_dir)
            else:
                self._errors[key] = check_text(use.rows, loaded.base_dir, roles, use.carried)
        return self._errors[key]

    def _facts_of(self, source: ImageSource, base_dir: Path) -> ImageSetFacts | None:
        key = (source.model_dump_json(), base_dir)
        if key not in self._facts:
            self._facts[key] = find_image_set_facts(source, base_dir)
        return self._facts[key]


def _value(source: Source | ImageSource, field: str) -> Any:
    """What a source has at one of its keys, or at a place of a list."""
    value: Any = source
    for part in field.split("."):
        if isinstance(value, list):
            value = value[int(part)]
        elif not part.isdigit():
            value = getattr(value, part, "")
    return value
