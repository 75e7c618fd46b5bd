"""Pictures that meet in a stage: those of its data, and those that the models it takes were made for."""

from collections.abc import Iterator, Mapping

from recipes.data.image_facts import find_picture_facts
from recipes.data.images import ImageSource
from recipes.errors import Problem
from recipes.loading.document import LoadedRecipe
from recipes.problem_codes import Code
from recipes.references import StageRef, parse_reference
from recipes.rules.chain import picture_stage_of
from recipes.stages.ddpo import ClassReward
from recipes.stages.evaluate import Evaluate
from recipes.stages.finetune import FinetuneImages
from recipes.stages.kinds import Stage
from recipes.stages.pretrain import PretrainImages
from recipes.stages.rl import PpoImages


def check_picture_forms(loaded: LoadedRecipe) -> Iterator[Problem]:
    """Pictures of another size or with other channels than what they meet, as far as headers tell."""
    stages = loaded.recipe.stages
    for name, stage in stages.items():
        known = _own_pictures(stage, stages)
        form = None if known is None else _form(known, loaded)
        if known is None or form is None:
            continue
        for field_path, text, source in _met_pictures(stage, stages):
            other = _form(source, loaded)
            if other is not None and other != form:
                message = f"image shapes differ: {other} here, {form} in {_named(stage)}"
                advice = "set size and channels of both sources"
                yield loaded.problem(Code.IMAGE_SHAPE_MISMATCH, f"stages.{name}.{field_path}", text, message, advice)


def _own_pictures(stage: Stage, stages: Mapping[str, Stage]) -> ImageSource | None:
    """The pictures that what a stage meets must be like."""
    match stage:
        case PretrainImages() | FinetuneImages():
            return stage.data
        case PpoImages():
            return _pictures_of(stage.actor, stages)
        case Evaluate():
            return stage.images
        case _:
            return None


def _named(stage: Stage) -> str:
    match stage:
        case PpoImages():
            return "the actor"
        case Evaluate():
            return "images"
        case _:
            return "data"


def _met_pictures(stage: Stage, stages: Mapping[str, Stage]) -> Iterator[tuple[str, str, ImageSource]]:
    """Field, what it holds, and the pictures behind it."""
    inputs: dict[str, str] = {}
    match stage:
        case PretrainImages() | FinetuneImages():
            if stage.evaluation is not None:
                yield "evaluation", stage.evaluation.source, stage.evaluation
            if isinstance(stage, FinetuneImages):
                inputs["init_from"] = stage.init_from
            elif stage.autoencoder is not None:
                inputs["autoencoder"] = stage.autoencoder
        case PpoImages(reward=ClassReward(classifier=classifier)):
            inputs["reward.classifier"] = classifier
        case Evaluate():
            inputs |= {f"of.{index}": text for index, text in enumerate(stage.of)}
            inputs |= {} if stage.features is None else {"features": stage.features}
    for field_path, text in inputs.items():
        source = _pictures_of(text, stages)
        if source is not None:
            yield field_path, text, source


def _pictures_of(text: str, stages: Mapping[str, Stage]) -> ImageSource | None:
    """The pictures that a referenced model was made for; None: it is none of the recipe's."""
    try:
        reference = parse_reference(text)
    except ValueError:
        return None
    stage = stages.get(reference.stage) if isinstance(reference, StageRef) else None
    start = None if stage is None else picture_stage_of(stage, stages)
    return None if start is None else start.data


def _form(source: ImageSource, loaded: LoadedRecipe) -> str | None:
    facts = find_picture_facts(source, loaded.base_dir)
    if facts is None:
        return None
    return f"{facts.height}x{facts.width}x{facts.channels}"
