"""Families of image models: the one place that knows all of them at run time."""

from typing import TYPE_CHECKING

from recipes.models.images.architecture import ImageArchitecture
from recipes.models.images.classifier import Classifier
from recipes.models.images.ddpm import Ddpm
from recipes.models.images.gan import Gan
from recipes.models.images.vae import Vae

if TYPE_CHECKING:
    from trainers.models.images.latents import LatentCodec
    from trainers.models.images.protocol import ImageFacts, ImageFamily
    from trainers.models.images.text_encoder import TextEncoder


def build_image_family(
    architecture: ImageArchitecture,
    facts: "ImageFacts",
    codec: "LatentCodec | None" = None,
    text: "TextEncoder | None" = None,
) -> "ImageFamily":
    """Build a model of the architecture's family; raises RequestError for images that do not fit it.

    `codec` is the autoencoder of a latent diffusion, `text` reads captions.
    """
    match architecture:
        case Classifier():
            from trainers.models.images.classifier import ClassifierFamily

            return ClassifierFamily(architecture, facts)
        case Vae():
            from trainers.models.images.vae import VaeFamily

            return VaeFamily(architecture, facts)
        case Gan():
            from trainers.models.images.gan import GanFamily

            return GanFamily(architecture, facts)
        case Ddpm():
            from trainers.models.images.ddpm import DdpmFamily

            return DdpmFamily(architecture, facts, codec, text)
