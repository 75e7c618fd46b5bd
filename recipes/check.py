"""The static pass: everything knowable about a recipe from its text and the headers of local files, all at once."""

from collections.abc import Iterable
from pathlib import Path

from recipes.arithmetic import check_arithmetic
from recipes.chain import check_chain
from recipes.data_files import check_data
from recipes.errors import Problem, RecipeError
from recipes.load import LoadedRecipe, load_recipe
from recipes.models import check_models


def check_static(loaded: LoadedRecipe) -> list[Problem]:
    """Every problem of a recipe whose schema is right, in the order of its lines."""
    problems = [
        *check_chain(loaded),
        *check_arithmetic(loaded),
        *check_models(loaded),
        *check_data(loaded),
    ]
    return sorted(problems, key=lambda problem: (problem.file != str(loaded.path), problem.line or 0))


def check_file(
    path: str | Path, overrides: Iterable[str] = (), smoke: bool = False
) -> tuple[LoadedRecipe | None, list[Problem]]:
    """Load and check a recipe file; the loaded recipe is None when its schema is wrong."""
    try:
        loaded = load_recipe(path, overrides, smoke)
    except RecipeError as error:
        return None, error.problems
    return loaded, check_static(loaded)
