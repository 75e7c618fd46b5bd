"""Labels: who needs them and whether the data has them, and pseudo-labels that would teach nothing."""

from collections.abc import Iterator

from recipes.data.images import ImageSource
from recipes.errors import Problem
from recipes.loading.document import LoadedRecipe
from recipes.models.image_models import Classifier, Ddpm, Gan
from recipes.problem_codes import Code
from recipes.rules.chain import picture_stage_of
from recipes.rules.models import model_facts
from recipes.stages.finetune import Finetune, FinetuneImages
from recipes.stages.pretrain import PretrainImages


def check_labels(loaded: LoadedRecipe) -> Iterator[Problem]:
    """Sources without the labels that a family learns from; pseudo-labels without rows or steps to learn from."""
    for name, stage in loaded.recipe.stages.items():
        place = f"stages.{name}"
        if isinstance(stage, PretrainImages | FinetuneImages):
            start = picture_stage_of(stage, loaded.recipe.stages)
            reader = None if start is None else _reader(start)
            if isinstance(stage, FinetuneImages):
                reader = reader and stage.init_from
            for use in stage.sources():
                if reader is not None and not use.held_out:
                    yield from _check_pictures(loaded, f"{place}.{use.field_path}", use.pictures, reader)
        if isinstance(stage, Finetune) and model_facts(loaded, stage).family == "encoder":
            for use in stage.sources():
                if use.rows.has_labels is False and not use.held_out:
                    message = "plain text has no labels, which a classifier learns"
                    yield loaded.problem(
                        Code.MISSING_LABELS,
                        f"{place}.{use.field_path}.source",
                        "text",
                        message,
                        "use jsonl, csv, parquet",
                    )
            yield from _check_pseudo_labels(loaded, place, stage)


def _reader(stage: PretrainImages) -> str | None:
    """What of a stage reads its pictures' labels, as a message names it; None: nothing does."""
    match stage.architecture:
        case Classifier():
            return "a classifier"
        case Ddpm(class_conditional=True) | Gan(class_conditional=True):
            return "class_conditional"
    return None


def _check_pictures(loaded: LoadedRecipe, place: str, source: ImageSource, reader: str) -> Iterator[Problem]:
    key = source.label_key
    if key is not None:
        message = f"these images have no labels, which {reader} reads"
        yield loaded.problem(Code.MISSING_LABELS, f"{place}.{key}", "", message, f"set {key}")


def _check_pseudo_labels(loaded: LoadedRecipe, place: str, stage: Finetune) -> Iterator[Problem]:
    if stage.pseudo_labels is None:
        return
    if stage.labelled_share == 1 and stage.data.has_labels:
        message = f"every row of {stage.data.source} has a label that is used; no row is left to pseudo-label"
        yield loaded.problem(Code.NO_EFFECT, f"{place}.pseudo_labels", "", message, "a labelled_share below 1")
    steps, warmup = stage.steps(), stage.pseudo_labels.warmup_steps
    if steps is not None and warmup >= steps:
        message = f"pseudo-labels would never be used; the stage has {steps} steps"
        yield loaded.problem(
            Code.WARMUP_TOO_LONG, f"{place}.pseudo_labels.warmup_steps", warmup, message, f"below {steps}"
        )
