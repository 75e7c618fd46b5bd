"""The static pass: everything knowable about a recipe from its text and the headers of model folders, all at once."""

from recipes.errors import Problem
from recipes.loaded_recipe import LoadedRecipe
from recipes.rules.arithmetic import check_arithmetic
from recipes.rules.captions import check_captions
from recipes.rules.chain import check_chain
from recipes.rules.end_tokens import end_token_warnings
from recipes.rules.labels import check_labels
from recipes.rules.models import check_models
from recipes.rules.report import check_gates
from recipes.rules.reward_tuning import check_reward_tuning
from recipes.rules.templates import check_templates


def check_static(loaded: LoadedRecipe) -> list[Problem]:
    """Every problem of a recipe whose schema is right, in the order of its lines; `load_recipe` calls it."""
    problems = [
        *check_chain(loaded),
        *check_arithmetic(loaded),
        *check_reward_tuning(loaded),
        *check_models(loaded),
        *check_templates(loaded),
        *check_captions(loaded),
        *check_labels(loaded),
        *check_gates(loaded),
    ]
    return sorted(problems, key=lambda problem: (problem.file != str(loaded.path), problem.line or 0))


def static_warnings(loaded: LoadedRecipe) -> list[Problem]:
    """What is worth knowing of a recipe that is right."""
    return [*end_token_warnings(loaded)]
