"""Sizes of pictures: those that meet in a stage must be of one, and networks that halve it need a multiple."""

from collections.abc import Callable, Iterator, Mapping

from recipes.data.images import ImageSource, PictureFacts
from recipes.errors import Problem
from recipes.loading.document import LoadedRecipe
from recipes.models.image_models import Ddpm, Vae
from recipes.problem_codes import Code
from recipes.references import StageRef, parse_reference
from recipes.rules.chain import autoencoder_of, picture_stage_of
from recipes.stages.ddpo import ClassReward
from recipes.stages.evaluate import Evaluate
from recipes.stages.finetune import FinetuneImages
from recipes.stages.kinds import Stage
from recipes.stages.pretrain import PretrainImages
from recipes.stages.rl import PpoImages

FactsOf = Callable[[ImageSource], PictureFacts | None]
"""Tells the size of a source's pictures; None: not known."""


def check_picture_forms(loaded: LoadedRecipe, facts_of: FactsOf) -> Iterator[Problem]:
    """Pictures of another size or with other channels than what they meet, or of a size that cannot be halved."""
    stages = loaded.recipe.stages
    for name, stage in stages.items():
        if isinstance(stage, PretrainImages):
            yield from _check_halvings(loaded, f"stages.{name}", stage, facts_of(stage.data))
        known = _own_pictures(stage, stages)
        form = None if known is None else _form(facts_of(known))
        if known is None or form is None:
            continue
        for field_path, text, source in _met_pictures(stage, stages):
            other = _form(facts_of(source))
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


def _form(facts: PictureFacts | None) -> str | None:
    if facts is None:
        return None
    return f"{facts.height}x{facts.width}x{facts.channels}"


def _check_halvings(
    loaded: LoadedRecipe, place: str, stage: PretrainImages, facts: PictureFacts | None
) -> Iterator[Problem]:
    """diffusers' networks halve the size by convolutions that need even numbers."""
    architecture = stage.architecture
    what, reduced = "images", 1
    if isinstance(architecture, Ddpm):
        key, levels = "block_out_channels", len(architecture.block_out_channels)
        if stage.autoencoder is not None:
            autoencoder = autoencoder_of(stage, loaded.recipe.stages)
            if autoencoder is None or autoencoder.type != "autoencoder_kl":
                return
            what, reduced = f"latents of {stage.autoencoder}", autoencoder.reduction
    elif isinstance(architecture, Vae) and architecture.type == "autoencoder_kl":
        key, levels = "depth", architecture.depth
    else:
        return
    if facts is None or facts.height % reduced or facts.width % reduced:
        return
    height, width, factor = facts.height // reduced, facts.width // reduced, 2 ** (levels - 1)
    if height % factor or width % factor:
        message = (
            f"{levels} levels halve the size {levels - 1} times, but the {what} are {height}x{width}, "
            f"not a multiple of {factor}"
        )
        suggestion = (
            "fewer levels" + (f", there or in {stage.autoencoder}" if reduced > 1 else "") + ", or set data.size"
        )
        yield loaded.problem(
            Code.SIZE_NOT_DIVISIBLE, f"{place}.architecture.{key}", getattr(architecture, key), message, suggestion
        )
