"""Gates on metrics that will not be measured."""

from collections.abc import Iterator

from recipes.errors import Problem
from recipes.loaded_recipe import LoadedRecipe
from recipes.nearest import nearest
from recipes.problem_codes import Code
from recipes.references import StageRef, parse_reference
from recipes.stages.answers import SOURCE_FIELDS
from recipes.stages.evaluate import Evaluate


def _is_known(loaded: LoadedRecipe, text: str) -> bool:
    """Whether a reference, if to a stage at all, means one of the recipe's, so that its metrics have the right name."""
    reference = parse_reference(text)
    return not isinstance(reference, StageRef) or reference.stage in {*loaded.recipe.stages, *loaded.unsound}


def check_gates(loaded: LoadedRecipe) -> Iterator[Problem]:
    """Gates on metrics that will not be measured, and bounds that nothing can meet."""
    for name, stage in loaded.stages_with(*SOURCE_FIELDS):
        if (finding := stage.held_out_rule()) is not None:
            yield loaded.problem_from(finding, f"stages.{name}.data", "")
    for name, stage in loaded.stages_with("of", "suites", "rewards", "gates"):
        if not isinstance(stage, Evaluate) or not stage.gates:
            continue
        try:
            known = sorted(stage.metrics())
        except ValueError:
            continue
        for index, gate in enumerate(stage.gates):
            place = f"stages.{name}.gates.{index}"
            if gate.metric not in known and all(_is_known(loaded, text) for text in stage.of):
                guess = nearest(gate.metric, known)
                suggestion = f"did you mean {guess}?" if guess else "there are: " + ", ".join(known)
                message = f"the report of {', '.join([*stage.suites, *stage.benchmarks])} has no such metric"
                yield loaded.problem(Code.UNKNOWN_METRIC, f"{place}.metric", gate.metric, message, suggestion)
            if gate.min is not None and gate.max is not None and gate.min > gate.max:
                yield loaded.problem(
                    Code.MIN_ABOVE_MAX, f"{place}.min", gate.min, f"min must be at most max ({gate.max})"
                )
