"""Generative adversarial networks: the keys of their configuration."""

from collections.abc import Iterator
from typing import ClassVar, Literal, Self

from recipes.data.images import ImageSetFacts
from recipes.errors import FieldFinding, at
from recipes.fields import meaning
from recipes.models.images.base import SETTINGS, VENDI_IMAGES, EmaDecay, ImageModel, Names
from recipes.models.images.tally import Tally, TextSizes, count_decoder, count_encoder
from recipes.problem_codes import Code


class Gan(ImageModel):
    """Generative adversarial networks (Goodfellow et al. 2014): a generator and a discriminator, trained in turn."""

    noun: ClassVar[str] = "generative adversarial networks"
    draws: ClassVar[bool] = True
    largest_zero: ClassVar[int] = 2  # its networks call each other
    family: Literal["gan"] = meaning(description="Generative adversarial networks.")
    type: Literal["convnet", "mlp"] = meaning("convnet", description="Convolutions, or fully connected layers.")
    width: int = meaning(
        32, ge=1, le=65_536, description="Channels at the image's size, doubled at each halving; mlp: units."
    )
    depth: int = meaning(2, ge=1, le=12, description="Halvings of the size (convnet) or hidden layers (mlp).")
    latent: int = meaning(64, ge=1, le=65_536, description="Size of the noise vector.")
    loss: Literal["non_saturating", "hinge", "wasserstein_gp"] = meaning(
        "non_saturating",
        description="Goodfellow et al. 2014; hinge (Lim & Ye 2017); Wasserstein with gradient penalty "
        "(Gulrajani et al. 2017).",
    )
    gradient_penalty: float = meaning(10.0, gt=0, le=1000, description="wasserstein_gp: weight of the penalty.")
    r1_gamma: float = meaning(
        0.0, ge=0, le=1000, description="Weight of the R1 penalty on real images (Mescheder et al. 2018); 0: none."
    )
    spectral_norm: bool = meaning(
        False, description="Divide the discriminator's weights by their largest singular value (Miyato et al. 2018)."
    )
    discriminator_lr_ratio: float = meaning(
        1.0, gt=0, le=100, description="Learning rate of the discriminator over the generator's."
    )
    ema_decay: EmaDecay | None = meaning(
        None, description="Decay of the moving average of the generator, which is what draws; null: the last weights."
    )
    class_conditional: bool = meaning(False, description="Condition both networks on the labels of the data.")
    collapse_below: float = meaning(
        0.5,
        ge=0,
        le=1,
        description="Alarm: the gate fails where drawn images' Vendi score is below this share of real ones'.",
    )

    def training_rules(self, *, steps: int | None, grid: int) -> Iterator[FieldFinding]:
        """Too few images for the diversity that the gate asks for."""
        if 0 < grid < VENDI_IMAGES and self.collapse_below > 0:
            message = f"the check of collapse_below needs {VENDI_IMAGES} images"
            yield at("train.grid", grid, Code.TOO_FEW_SAMPLES, message, f"at least {VENDI_IMAGES}, or 0")

    def tally(
        self, facts: ImageSetFacts, autoencoder: ImageModel | None = None, text: TextSizes | None = None
    ) -> Tally:
        """Both networks, and what the larger phase of a step keeps."""
        generator, discriminator = Tally(), Tally()
        inputs, features = self.latent, 4 * self.width
        if self.class_conditional:
            generator.parameters += facts.classes * self.latent
            discriminator.parameters += facts.classes * features
            inputs *= 2
        count_decoder(generator, self.type, facts, self.width, self.depth, inputs)
        count_encoder(discriminator, self.type, facts, self.width, self.depth, features)
        discriminator.linear(features, 1)
        is_penalised = self.r1_gamma > 0 or self.loss == "wasserstein_gp"
        judged = discriminator.kept * (6 if is_penalised else 2)  # of real and of drawn ones; a gradient of a gradient
        # The generator draws in both phases; the discriminator judges real and drawn images, then drawn ones again.
        flops = 2 * generator.flops + 3 * discriminator.flops
        parameters = generator.parameters + discriminator.parameters
        return Tally(parameters, max(judged, generator.kept + discriminator.kept), flops=flops)

    def files(self, *, is_latent: bool) -> tuple[Names, Names]:
        """Weights and configurations of its folder."""
        return ("discriminator.safetensors", "generator.safetensors"), (SETTINGS,)

    @property
    def label_reader(self) -> str | None:
        """What reads the images' labels, as a message names it; None: nothing does."""
        return "class_conditional" if self.class_conditional else None

    @property
    def averaging(self) -> float | None:
        """Decay of the moving average, as it is set."""
        return self.ema_decay

    def shrunk(self) -> Self:
        """The smoke form."""
        return self.changed(width=min(self.width, 8), latent=min(self.latent, 8))
