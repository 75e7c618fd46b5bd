"""Labels: who needs them and whether the data has them, and pseudo-labels that would teach nothing."""

from collections.abc import Iterator

from recipes.data.images import missing_labels
from recipes.errors import Problem
from recipes.loaded_recipe import LoadedRecipe
from recipes.problem_codes import Code
from recipes.rules.chain import image_stage_of
from recipes.rules.models import model_facts
from recipes.stages.base import TextStage
from recipes.stages.training_stage import ImageTraining


def check_labels(loaded: LoadedRecipe) -> Iterator[Problem]:
    """Sources without the labels that a family learns from; pseudo-labels without rows or steps to learn from."""
    for name, stage in loaded.recipe.stages.items():
        place = f"stages.{name}"
        if isinstance(stage, ImageTraining):
            start = image_stage_of(stage, loaded.recipe.stages)
            reader = None if start is None else start.architecture.label_reader
            for use in stage.sources():
                key = use.images.label_key
                if reader is not None and key is not None and not use.held_out:
                    finding = missing_labels(stage.image_start() or reader, key)
                    yield loaded.problem_from(finding, f"{place}.{use.field_path}.{key}", "")
        if isinstance(stage, TextStage) and stage.is_classifier(model_facts(loaded, stage).family):
            for use in stage.sources():
                if use.rows.has_labels is False and not use.held_out:
                    message = "plain text has no labels, which a classifier learns"
                    yield loaded.problem(
                        Code.MISSING_LABELS,
                        f"{place}.{use.field_path}.source",
                        "text",
                        message,
                        "use labels: folder, jsonl, csv or parquet",
                    )
