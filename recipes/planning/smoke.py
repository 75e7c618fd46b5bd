"""The tiny CPU form of any recipe: the same stages, engines and seams, small models, few rows and steps (pure)."""

from recipes.recipe import Recipe
from recipes.rules.chain import built_by
from recipes.stages.kinds import Stage


def shrink(recipe: Recipe) -> Recipe:
    """The recipe's smoke form; shrinking it again changes nothing. A few steps teach nothing: gates do not refuse."""
    return recipe.changed(stages={name: _shrink_stage(stage, recipe) for name, stage in recipe.stages.items()})


def _shrink_stage(stage: Stage, recipe: Recipe) -> Stage:
    start = stage.text_start()
    is_built_here = start is not None and built_by(start, recipe.stages) is not None
    return stage.shrunk(is_built_here=is_built_here).changed(gate="ignore")
