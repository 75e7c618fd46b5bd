from recipes.errors import Problem
from recipes.load import LoadedRecipe


def check_static(loaded: LoadedRecipe) -> list[Problem]:
    """Everything that can be known about a valid recipe without a cluster."""
    return []
