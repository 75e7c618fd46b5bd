"""Variational autoencoders: the keys of their configuration."""

from collections.abc import Iterator
from typing import ClassVar, Literal, Self

from pydantic import model_validator

from recipes.data.images import ImageSetFacts, Shape
from recipes.errors import FieldFinding, Finding, at
from recipes.fields import meaning, refuse
from recipes.models.images.base import SETTINGS, STOCK_WEIGHTS, ImageModel, Names, halving_rule
from recipes.models.images.tally import Tally, TextSizes, count_decoder, count_encoder
from recipes.problem_codes import Code
from recipes.smoke_sizes import STEPS, WIDTH


class Vae(ImageModel):
    """Variational autoencoder (Kingma & Welling 2013)."""

    noun: ClassVar[str] = "a variational autoencoder"
    draws: ClassVar[bool] = True
    has_latents: ClassVar[bool] = True
    family: Literal["vae"] = meaning(description="Variational autoencoder.")
    type: Literal["mlp", "convnet", "autoencoder_kl"] = meaning(
        "mlp",
        description="mlp and convnet encode an image as one vector; autoencoder_kl is diffusers' AutoencoderKL, whose "
        "latents keep a height and a width.",
    )
    width: int = meaning(
        400,
        ge=1,
        le=65_536,
        description="mlp: units of a hidden layer; else channels of the first level, doubled by each further one.",
    )
    depth: int = meaning(
        1, ge=1, le=12, description="mlp: hidden layers; convnet: halvings of the size; autoencoder_kl: levels."
    )
    latent: int = meaning(
        20, ge=1, le=65_536, description="Size of the latent vector; autoencoder_kl: channels of the latents."
    )
    likelihood: Literal["bernoulli", "gaussian"] = meaning(
        "bernoulli", description="Distribution of a pixel: Bernoulli, or Gaussian with the deviation `sd`."
    )
    sd: float = meaning(0.1, gt=0, le=10, description="gaussian: standard deviation of a pixel in [0, 1].")
    binarize: bool = meaning(
        False,
        description="bernoulli: draw every pixel as 0 or 1 by its grey value, each time it is read (dynamically).",
    )
    kl_weight: float = meaning(1.0, ge=0, le=1000, description="Weight of the KL term in training (beta).")
    kl_warmup_steps: int = meaning(
        0, ge=0, le=10**9, description="Steps over which the KL weight rises linearly from 0; 0: none."
    )
    free_bits: float = meaning(
        0.0, ge=0, le=1000, description="Nats of KL in each latent dimension that training does not charge."
    )

    @model_validator(mode="after")
    def _fitting(self) -> "Vae":
        if self.binarize and self.likelihood != "bernoulli":
            refuse(Code.UNMET_REQUIREMENT, "binarize draws pixels of 0 and 1, which needs likelihood: bernoulli")
        return self

    def latents_rule(self) -> Finding | None:
        """Why no diffusion can run in its latents; None: one can."""
        if self.type == "autoencoder_kl":
            return None
        message = f"diffusion needs latents with a height and a width; the autoencoder is of type {self.type}"
        return Finding(Code.UNSUPPORTED_AUTOENCODER, message, "train one of type: autoencoder_kl")

    def size_rule(self, height: int, width: int, what: str = "images") -> Finding | None:
        """Why it cannot take images of a size; None: it can."""
        return halving_rule(self.depth, height, width, what) if self.type == "autoencoder_kl" else None

    def latent_shape(self, height: int, width: int) -> Shape:
        """autoencoder_kl: channels, height and width of the latents; every level after the first halves the size."""
        factor = 1 << (self.depth - 1)
        return self.latent, height // factor, width // factor

    def training_rules(self, *, steps: int | None, grid: int) -> Iterator[FieldFinding]:
        """A warm-up of the KL weight that does not end."""
        if steps is not None and self.kl_warmup_steps > steps:
            message = f"the KL weight would never reach kl_weight; the stage has {steps} steps"
            code = Code.WARMUP_TOO_LONG
            yield at("architecture.kl_warmup_steps", self.kl_warmup_steps, code, message, f"at most {steps}")

    def tally(
        self, facts: ImageSetFacts, autoencoder: ImageModel | None = None, text: TextSizes | None = None
    ) -> Tally:
        """The network."""
        net = Tally()
        if self.type == "autoencoder_kl":
            self._tally_autoencoder_kl(net, facts)
        else:
            count_encoder(net, self.type, facts, self.width, self.depth, 2 * self.latent)
            count_decoder(net, self.type, facts, self.width, self.depth, self.latent)
        net.kept += 4 * facts.channels * facts.height * facts.width
        return net

    def _tally_autoencoder_kl(self, net: Tally, facts: ImageSetFacts) -> None:
        """Count diffusers' AutoencoderKL with one residual layer a level."""
        levels, latent = self.depth, self.latent
        channels = [self.width << level for level in range(levels)]
        areas = [max(1, (facts.height >> level) * (facts.width >> level)) for level in range(levels)]
        deep, area = channels[-1], areas[-1]
        net.conv(facts.channels, channels[0], areas[0])
        inputs = channels[0]
        for level, outputs in enumerate(channels):
            net.residual(inputs, outputs, areas[level])
            if level < levels - 1:
                net.conv(outputs, outputs, areas[level], drawn=areas[level + 1])
            inputs = outputs
        for _ in range(2):  # the middles of encoder and decoder
            net.residual(deep, deep, area)
            net.attention(deep, area, 1)
            net.residual(deep, deep, area)
        net.norm(deep, area)
        net.conv(deep, 2 * latent, area)
        net.conv(2 * latent, 2 * latent, area, size=1)
        net.conv(latent, latent, area, size=1)
        net.conv(latent, deep, area)
        inputs = deep
        for level in reversed(range(levels)):
            outputs = channels[level]
            net.residual(inputs, outputs, areas[level])
            net.residual(outputs, outputs, areas[level])
            if level > 0:
                net.conv(outputs, outputs, areas[level - 1])
            inputs = outputs
        net.norm(channels[0], areas[0])
        net.conv(channels[0], facts.channels, areas[0])

    def files(self, *, is_latent: bool) -> tuple[Names, Names]:
        """Weights and configurations of its folder."""
        if self.type == "autoencoder_kl":
            return (STOCK_WEIGHTS,), (SETTINGS, "config.json")
        return ("model.safetensors",), (SETTINGS,)

    def shrunk(self) -> Self:
        """The smoke form."""
        small = WIDTH if self.type == "mlp" else 8
        return self.changed(
            width=min(self.width, small),
            latent=min(self.latent, 8),
            kl_warmup_steps=min(self.kl_warmup_steps, STEPS),
        )
