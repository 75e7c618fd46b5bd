"""The static pass: everything knowable about a recipe from its text and the headers of local files, all at once."""

from recipes.arithmetic import check_arithmetic
from recipes.captions import check_captions
from recipes.chain import check_chain
from recipes.data_files import check_data
from recipes.end_tokens import end_token_warnings
from recipes.errors import Problem
from recipes.labels import check_labels
from recipes.loaded import LoadedRecipe
from recipes.models import check_models
from recipes.picture_forms import check_picture_forms
from recipes.picture_rows import check_pictures
from recipes.report import check_gates
from recipes.templates import check_templates


def check_static(loaded: LoadedRecipe) -> list[Problem]:
    """Every problem of a recipe whose schema is right, in the order of its lines; `load_recipe` calls it."""
    problems = [
        *check_chain(loaded),
        *check_arithmetic(loaded),
        *check_models(loaded),
        *check_templates(loaded),
        *check_captions(loaded),
        *check_labels(loaded),
        *check_picture_forms(loaded),
        *check_data(loaded),
        *check_pictures(loaded),
        *check_gates(loaded),
    ]
    return sorted(problems, key=lambda problem: (problem.file != str(loaded.path), problem.line or 0))


def static_warnings(loaded: LoadedRecipe) -> list[Problem]:
    """What is worth knowing of a recipe that is right."""
    return [*end_token_warnings(loaded)]
