"""The families of image models, and what can be asked of them all."""

from collections.abc import Callable
from typing import Annotated, get_args

from pydantic import Field

from recipes.artifact_kinds import ImageKind
from recipes.models.images.base import ImageModel
from recipes.models.images.classifier import Classifier
from recipes.models.images.ddpm import Ddpm
from recipes.models.images.gan import Gan
from recipes.models.images.vae import Vae

ImageArchitecture = Annotated[Classifier | Vae | Gan | Ddpm, Field(discriminator="family")]

IMAGE_FAMILIES: dict[ImageKind, type[ImageModel]] = {
    family.kind(): family for family in get_args(get_args(ImageArchitecture)[0])
}
"""Configuration classes by the kind of artifact that each makes: its family's name."""


def _kinds(has: Callable[[type[ImageModel]], bool]) -> tuple[ImageKind, ...]:
    return tuple(kind for kind, family in IMAGE_FAMILIES.items() if has(family))


DRAWING_KINDS = _kinds(lambda family: family.draws)
"""Models that draw images."""
CLASSIFYING_KINDS = _kinds(lambda family: family.classifies)
"""Models that tell images' classes apart."""
ENCODING_KINDS = _kinds(lambda family: family.has_latents)
"""Models in whose latents others can work."""
