"""Families of image models: one configuration each, network and objective together."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from recipes.data.images import ImageSetFacts
from recipes.errors import FieldFinding, Finding, at
from recipes.fields import Strict, meaning, raise_all, refuse
from recipes.models.tally import Tally, TextSizes, count_decoder, count_encoder
from recipes.problem_codes import Code
from recipes.smoke_sizes import STEPS, WIDTH

VENDI_IMAGES = 16
"""Fewest drawn images whose diversity says something."""

SETTINGS = "image.json"
"""What a model folder says of itself: family, configuration, images, classes."""
STOCK_WEIGHTS = "diffusion_pytorch_model.safetensors"
"""diffusers' name of a network's weights."""

Names = tuple[str, ...]
EmaDecay = Annotated[float, Field(gt=0, lt=1)]


def halving_rule(levels: int, height: int, width: int, what: str = "images") -> Finding | None:
    """diffusers' networks halve the size by convolutions that need even numbers; None: they fit."""
    factor = 2 ** (levels - 1)
    if height % factor == 0 and width % factor == 0:
        return None
    message = (
        f"{levels} levels halve the size {levels - 1} times, but the {what} are {height}x{width}, not a multiple of "
        f"{factor}"
    )
    return Finding(Code.SIZE_NOT_DIVISIBLE, message, "fewer levels, or set the source's size")


class _ImageModel(Strict):
    """What the families share: answers that most of them give alike."""

    largest_zero: ClassVar[int] = 3
    """The most that ZeRO may shard."""

    def training_rules(self, *, steps: int | None, grid: int) -> Iterator[FieldFinding]:
        """What does not fit a stage of so many steps that draws `grid` images."""
        yield from ()


class Classifier(_ImageModel):
    """Image classifier, supervised with the labels of its data; also the feature network of image metrics."""

    family: Literal["classifier"] = meaning(description="Image classifier.")
    type: Literal["convnet", "mlp"] = meaning("convnet", description="Strided convolutions, or fully connected layers.")
    width: int = meaning(
        32, ge=1, le=65_536, description="Channels of the first convolution, doubled by each further one; mlp: units."
    )
    depth: int = meaning(2, ge=1, le=12, description="Convolutions (each halves the size) or hidden layers.")
    features: int = meaning(64, ge=2, le=65_536, description="Width of the last hidden layer, the features of metrics.")
    label_smoothing: float = meaning(0.0, ge=0, lt=1, description="Share of the target spread over all classes.")

    def tally(self, facts: ImageSetFacts, autoencoder: "Vae | None" = None, text: TextSizes | None = None) -> Tally:
        """The network."""
        net = Tally()
        count_encoder(net, self.type, facts, self.width, self.depth, self.features)
        net.linear(self.features, facts.classes)
        return net

    def files(self, *, is_latent: bool) -> tuple[Names, Names]:
        """Weights and configurations of its folder."""
        return ("model.safetensors",), (SETTINGS,)

    @property
    def label_reader(self) -> str | None:
        """What reads the images' labels, as a message names it; None: nothing does."""
        return "a classifier"

    def shrunk(self) -> Self:
        """The smoke form."""
        return self.changed(width=min(self.width, 16), features=min(self.features, 16))


class Vae(_ImageModel):
    """Variational autoencoder (Kingma & Welling 2013)."""

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
        False, description="bernoulli: draw every pixel as 0 or 1 with its grey value anew each time (dynamically)."
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

    def size_rule(self, height: int, width: int) -> Finding | None:
        """Why it cannot take images of a size; None: it can."""
        return halving_rule(self.depth, height, width) if self.type == "autoencoder_kl" else None

    @property
    def reduction(self) -> int:
        """autoencoder_kl: how many pixels of a row one place of the latents stands for."""
        return 1 << (self.depth - 1)

    def training_rules(self, *, steps: int | None, grid: int) -> Iterator[FieldFinding]:
        """A warm-up of the KL weight that does not end."""
        if steps is not None and self.kl_warmup_steps > steps:
            message = f"the KL weight would never reach kl_weight; the stage has {steps} steps"
            code = Code.WARMUP_TOO_LONG
            yield at("architecture.kl_warmup_steps", self.kl_warmup_steps, code, message, f"at most {steps}")

    def tally(self, facts: ImageSetFacts, autoencoder: "Vae | None" = None, text: TextSizes | None = None) -> Tally:
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
                net.conv(outputs, outputs, areas[level])
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

    @property
    def label_reader(self) -> str | None:
        """What reads the images' labels, as a message names it; None: nothing does."""
        return None

    def shrunk(self) -> Self:
        """The smoke form."""
        small = WIDTH if self.type == "mlp" else 8
        return self.changed(
            width=min(self.width, small),
            latent=min(self.latent, 8),
            kl_warmup_steps=min(self.kl_warmup_steps, STEPS),
        )


class Ddpm(_ImageModel):
    """Denoising diffusion (Ho et al. 2020) with diffusers' UNet2DModel (of captions: UNet2DConditionModel)."""

    family: Literal["ddpm"] = meaning(description="Denoising diffusion.")
    block_out_channels: list[Annotated[int, Field(ge=4, le=8192)]] = meaning(
        default_factory=lambda: [32, 64],
        min_length=1,
        max_length=8,
        description="Channels of each level; every level after the first halves the size.",
    )
    layers_per_block: int = meaning(2, ge=1, le=16, description="Residual layers of a level.")
    attention_levels: list[Annotated[int, Field(ge=0, le=7)]] = meaning(
        default_factory=list,
        description="Levels with self-attention, from 0, and with attention to the caption where a text_encoder is "
        "named; the middle always has both.",
    )
    norm_num_groups: int = meaning(8, ge=1, le=256, description="Groups of the norms; must divide every level.")
    timesteps: int = meaning(1000, ge=2, le=10_000, description="Steps of the noising process.")
    betas: Literal["linear", "cosine"] = meaning(
        "linear", description="Noise schedule: linear (Ho et al. 2020) or cosine (Nichol & Dhariwal 2021)."
    )
    prediction: Literal["epsilon", "v", "x0"] = meaning(
        "epsilon", description="What the network predicts: the noise, the velocity (Salimans & Ho 2022), the image."
    )
    min_snr_gamma: float | None = meaning(
        None, gt=0, le=100, description="Min-SNR loss weights with this gamma (Hang et al. 2023); None: all weights 1."
    )
    ema_decay: EmaDecay | None = meaning(
        None, description="Decay of the moving average of the weights, which is what is kept; None: the last weights."
    )
    class_conditional: bool = meaning(False, description="Condition on the labels of the data.")
    label_dropout: float = meaning(
        0.1,
        ge=0,
        lt=1,
        description="Share of samples trained without their label or caption, for guidance (Ho & Salimans 2022).",
    )
    sampler: Literal["ddpm", "ddim", "dpm_solver"] = meaning(
        "ddim", description="How images are drawn: ancestral, DDIM (Song et al. 2021), DPM-Solver++ (Lu et al. 2022)."
    )
    sampling_steps: int = meaning(50, ge=1, le=10_000, description="Network calls of a drawn image.")
    guidance: float = meaning(1.0, ge=0, le=100, description="Classifier-free guidance scale of drawn images; 1: none.")

    @model_validator(mode="after")
    def _fitting(self) -> "Ddpm":
        raise_all(self._misfits())
        return self

    def _misfits(self) -> Iterator[Finding]:
        odd = [channels for channels in self.block_out_channels if channels % self.norm_num_groups]
        if odd:
            yield Finding(
                Code.NOT_DIVISIBLE,
                f"norm_num_groups ({self.norm_num_groups}) must divide block_out_channels ({odd[0]})",
            )
        levels = len(self.block_out_channels)
        for level in self.attention_levels:
            if level >= levels:
                yield Finding(Code.OUT_OF_RANGE, f"attention_levels: no level {level}; there are 0 to {levels - 1}")
        if self.sampling_steps > self.timesteps:
            yield Finding(
                Code.TOO_MANY_STEPS,
                f"sampling_steps ({self.sampling_steps}) must be at most timesteps ({self.timesteps})",
            )
        if self.guidance != 1 and self.label_dropout == 0:
            yield Finding(
                Code.UNMET_REQUIREMENT,
                "guidance needs samples trained without their condition: set label_dropout above 0",
            )

    def size_rule(self, height: int, width: int, what: str = "images") -> Finding | None:
        """Why its network cannot take images or latents of a size; None: it can."""
        return halving_rule(len(self.block_out_channels), height, width, what)

    @property
    def is_guidable(self) -> bool:
        """Whether the network knows how to do without a label."""
        return self.class_conditional and self.label_dropout > 0

    def tally(self, facts: ImageSetFacts, autoencoder: Vae | None = None, text: TextSizes | None = None) -> Tally:
        """diffusers' UNet2DModel, or with a text encoder UNet2DConditionModel; in an autoencoder's latents."""
        net = Tally()
        if autoencoder is not None:
            factor = autoencoder.reduction
            facts = ImageSetFacts(autoencoder.latent, facts.height // factor, facts.width // factor, facts.classes)

        def attend(width: int, area: int) -> None:
            if text is None:
                net.attention(width, area, width // head)
            else:
                net.transformer(width, area, max(1, width // 8), text.width)

        channels, layers = self.block_out_channels, self.layers_per_block
        head = min(8, *channels)
        areas = [max(1, (facts.height >> level) * (facts.width >> level)) for level in range(len(channels))]
        embedding, last = 4 * channels[0], len(channels) - 1
        net.conv(facts.channels, channels[0], areas[0])
        net.linear(channels[0], embedding)
        net.linear(embedding, embedding)
        if self.class_conditional:
            net.parameters += (facts.classes + self.is_guidable) * embedding
        inputs = channels[0]
        for level, outputs in enumerate(channels):
            for layer in range(layers):
                net.residual(inputs if layer == 0 else outputs, outputs, areas[level], embedding)
                if level in self.attention_levels:
                    attend(outputs, areas[level])
            if level < last:
                net.conv(outputs, outputs, areas[level])
            inputs = outputs
        for _ in range(2):
            net.residual(channels[-1], channels[-1], areas[-1], embedding)
        attend(channels[-1], areas[-1])
        before = channels[-1]
        for level in reversed(range(len(channels))):
            outputs = channels[level]
            for layer in range(layers + 1):
                skipped = channels[max(level - 1, 0)] if layer == layers else outputs
                net.residual((before if layer == 0 else outputs) + skipped, outputs, areas[level], embedding)
                if level in self.attention_levels:
                    attend(outputs, areas[level])
            if level > 0:
                net.conv(outputs, outputs, areas[level - 1])
            before = outputs
        net.norm(channels[0], areas[0])
        net.conv(channels[0], facts.channels, areas[0])
        return net

    def files(self, *, is_latent: bool) -> tuple[Names, Names]:
        """Weights and configurations of its folder; of one in latents the autoencoder's too."""
        weights: Names = (f"unet/{STOCK_WEIGHTS}",)
        configs: Names = (SETTINGS, "scheduler/scheduler_config.json", "unet/config.json")
        if is_latent:
            weights = (*weights, f"vae/{STOCK_WEIGHTS}")
            configs = (*configs, "vae/config.json", f"vae/{SETTINGS}")
        return weights, configs

    @property
    def label_reader(self) -> str | None:
        """What reads the images' labels, as a message names it; None: nothing does."""
        return "class_conditional" if self.class_conditional else None

    def shrunk(self) -> Self:
        """The smoke form."""
        groups = min(self.norm_num_groups, 4)
        return self.changed(
            block_out_channels=[8 for _ in self.block_out_channels],
            layers_per_block=1,
            norm_num_groups=groups if 8 % groups == 0 else 1,
            timesteps=min(self.timesteps, 100),
            sampling_steps=min(self.sampling_steps, 10),
        )


class Gan(_ImageModel):
    """Generative adversarial networks (Goodfellow et al. 2014): a generator and a discriminator, trained in turn."""

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
        None, description="Decay of the moving average of the generator, which is what draws; None: the last weights."
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

    def tally(self, facts: ImageSetFacts, autoencoder: Vae | None = None, text: TextSizes | None = None) -> Tally:
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
        return Tally(generator.parameters + discriminator.parameters, max(judged, generator.kept + discriminator.kept))

    def files(self, *, is_latent: bool) -> tuple[Names, Names]:
        """Weights and configurations of its folder."""
        return ("discriminator.safetensors", "generator.safetensors"), (SETTINGS,)

    @property
    def label_reader(self) -> str | None:
        """What reads the images' labels, as a message names it; None: nothing does."""
        return "class_conditional" if self.class_conditional else None

    def shrunk(self) -> Self:
        """The smoke form."""
        return self.changed(width=min(self.width, 8), latent=min(self.latent, 8))


ImageArchitecture = Annotated[Classifier | Vae | Gan | Ddpm, Field(discriminator="family")]
