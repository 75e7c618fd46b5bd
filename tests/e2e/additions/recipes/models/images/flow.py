"""Rectified flows: the keys of their configuration."""

from typing import ClassVar, Literal, Self

from recipes.data.images import ImageSetFacts
from recipes.fields import meaning
from recipes.models.images.base import SETTINGS, ImageModel, Names
from recipes.models.images.tally import Tally, TextSizes, count_decoder, count_encoder


class Flow(ImageModel):
    """Rectified flow (Liu et al. 2022): the velocity of straight paths from noise to images."""

    noun: ClassVar[str] = "a rectified flow"
    draws: ClassVar[bool] = True
    family: Literal["flow"] = meaning(description="Rectified flow.")
    width: int = meaning(256, ge=1, le=65_536, description="Units of a hidden layer.")
    depth: int = meaning(2, ge=1, le=12, description="Hidden layers on either side.")
    sampling_steps: int = meaning(20, ge=1, le=10_000, description="Steps of Euler's method from noise to an image.")

    def tally(
        self, facts: ImageSetFacts, autoencoder: ImageModel | None = None, text: TextSizes | None = None
    ) -> Tally:
        """The network."""
        net = Tally()
        count_encoder(net, "mlp", facts, self.width, self.depth, self.width)
        count_decoder(net, "mlp", facts, self.width, self.depth, self.width + 1)
        return net

    def files(self, *, is_latent: bool) -> tuple[Names, Names]:
        """Weights and configurations of its folder."""
        return ("model.safetensors",), (SETTINGS,)

    def shrunk(self) -> Self:
        """The smoke form."""
        return self.changed(width=min(self.width, 32), sampling_steps=min(self.sampling_steps, 8))
