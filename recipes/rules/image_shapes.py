"""Images that meet in a stage: those of its data, and those that the models it takes were made for."""

from collections.abc import Callable, Iterator

from recipes.data.images import ImageSetFacts, ImageSource, Shape, shape_rule
from recipes.errors import Problem
from recipes.loaded_recipe import LoadedRecipe
from recipes.models.images.architecture import IMAGE_FAMILIES
from recipes.rules.chain import autoencoder_of, image_builder, stage_of
from recipes.stages.base import StageBase
from recipes.stages.evaluate import compared_images
from recipes.stages.pretrain import PretrainImages

FactsOf = Callable[[ImageSource], ImageSetFacts | None]
"""Tells the size of a source's images; None: not known."""
CountsOf = Callable[[ImageSource], tuple[int, int] | None]
"""Tells how many images a source holds out, and how many others it has; None: not known."""


def check_image_forms(loaded: LoadedRecipe, facts_of: FactsOf) -> Iterator[Problem]:
    """Images of another size or with other channels than what they meet, as far as headers tell; sizes that a network
    cannot halve.
    """
    for name, stage in loaded.recipe.stages.items():
        if isinstance(stage, PretrainImages):
            yield from _check_halvings(loaded, name, stage, facts_of)
        reference = stage.image_reference()
        if reference is None:
            continue
        named, own = reference
        known = _shape(own, loaded, facts_of)
        for field_path, text, source in _met_images(stage, own):
            other = None if known is None else _shape(source, loaded, facts_of)
            if known is not None and other is not None and (finding := shape_rule(other, known, named)) is not None:
                yield loaded.problem_from(finding, f"stages.{name}.{field_path}", text)


def check_compared_images(loaded: LoadedRecipe, counts_of: CountsOf) -> Iterator[Problem]:
    """Too few images to compare, where there are so few that all of them are read."""
    for name, stage in loaded.recipe.stages.items():
        use = stage.find_source("images")
        counts = None if use is None else counts_of(use.images)
        if counts is not None and (finding := compared_images(*counts)) is not None:
            yield loaded.problem_from(finding, f"stages.{name}.images", "")


def _met_images(stage: StageBase, own: ImageSource | str) -> Iterator[tuple[str, str, ImageSource | str]]:
    """Field, what it holds, and the images or the model behind it."""
    evaluation = stage.find_source("evaluation")
    if evaluation is not None and evaluation.facts.is_images and not evaluation.is_derived:
        yield "evaluation", evaluation.images.source, evaluation.images
    for item in stage.inputs():
        if IMAGE_FAMILIES.keys() & set(item.wants) and item.text != own:
            yield item.field_path, item.text, item.text


def _check_halvings(loaded: LoadedRecipe, name: str, stage: PretrainImages, facts_of: FactsOf) -> Iterator[Problem]:
    architecture, shape = stage.architecture, _shape(stage.data, loaded, facts_of)
    if shape is None:
        return
    _, height, width = shape
    what = "images"
    if stage.autoencoder is not None:
        autoencoder = autoencoder_of(stage, loaded.recipe.stages)
        if autoencoder is None or autoencoder.latents_rule() is not None or autoencoder.size_rule(height, width):
            return
        _, height, width = autoencoder.latent_shape(height, width)
        what = f"latents of {stage.autoencoder}"
    finding, key = architecture.size_rule(height, width, what), architecture.size_key
    if finding is not None:
        yield loaded.problem_from(finding, f"stages.{name}.architecture.{key}", getattr(architecture, key))


def _shape(of: ImageSource | str, loaded: LoadedRecipe, facts_of: FactsOf) -> Shape | None:
    """The shape of a source's images, or of those that a model of the recipe was made for; None: not known."""
    if isinstance(of, str):
        stages = loaded.recipe.stages
        built = image_builder(stage_of(of, stages), stages)
        return None if built is None else _shape(built.data, loaded, facts_of)
    facts = facts_of(of)
    return None if facts is None else (facts.channels, facts.height, facts.width)
