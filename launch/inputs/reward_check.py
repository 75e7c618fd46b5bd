"""Terms of rewards, and environments, that need something of this installation: what of it is not here."""

from collections.abc import Iterator

from recipes.errors import Problem
from recipes.loaded_recipe import LoadedRecipe
from rlhf.environments.open import environment_finding
from rlhf.rewards.terms import term_finding


def check_rewards(loaded: LoadedRecipe) -> Iterator[Problem]:
    """Packages, functions and entry points that the rewards of a recipe name and that are not there."""
    for stage_name, stage in loaded.stages_with("rewards", "benchmarks"):
        for place, term in stage.placed_terms():
            if (finding := term_finding(term, loaded.base_dir)) is not None:
                yield loaded.problem_from(finding, f"stages.{stage_name}.{place}", "")
    for stage_name, stage in loaded.stages_with("environment"):
        environment = stage.converses_with
        if environment is not None and (finding := environment_finding(environment, loaded.base_dir)) is not None:
            yield loaded.problem_from(finding, f"stages.{stage_name}.environment", "")
