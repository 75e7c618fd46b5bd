"""Denoising diffusion: the keys of its configuration."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from recipes.data.images import ImageSetFacts
from recipes.errors import Finding
from recipes.fields import meaning, raise_all
from recipes.models.images.base import SETTINGS, STOCK_WEIGHTS, EmaDecay, ImageModel, Names, halving_rule
from recipes.models.images.tally import Tally, TextSizes
from recipes.problem_codes import Code


class Ddpm(ImageModel):
    """Denoising diffusion (Ho et al. 2020) with diffusers' UNet2DModel (of captions: UNet2DConditionModel)."""

    noun: ClassVar[str] = "a diffusion model"
    draws: ClassVar[bool] = True
    keys: ClassVar[tuple[str, ...]] = ("autoencoder", "text_encoder")
    size_key: ClassVar[str] = "block_out_channels"
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
        None, gt=0, le=100, description="Min-SNR loss weights with this gamma (Hang et al. 2023); null: all weights 1."
    )
    ema_decay: EmaDecay | None = meaning(
        None, description="Decay of the moving average of the weights, which is what is kept; null: the last weights."
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

    def condition_rules(self, *, reads_captions: bool) -> Iterator[Finding]:
        """Two conditions at once, and guidance without any."""
        if self.class_conditional and reads_captions:
            yield Finding(
                Code.CONFLICTING_KEYS,
                "give text_encoder or class_conditional: true, not both: the caption names the class",
            )
        if self.guidance != 1 and not (self.class_conditional or reads_captions):
            yield Finding(Code.UNMET_REQUIREMENT, "guidance needs class_conditional: true, or a text_encoder")

    @property
    def is_guidable(self) -> bool:
        """Whether the network knows how to do without a label."""
        return self.class_conditional and self.label_dropout > 0

    def tally(
        self, facts: ImageSetFacts, autoencoder: ImageModel | None = None, text: TextSizes | None = None
    ) -> Tally:
        """diffusers' UNet2DModel, or with a text encoder UNet2DConditionModel; in an autoencoder's latents."""
        net = Tally()
        if autoencoder is not None:
            facts = ImageSetFacts(*autoencoder.latent_shape(facts.height, facts.width), facts.classes)

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
                net.conv(outputs, outputs, areas[level], drawn=areas[level + 1])
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

    @property
    def averaging(self) -> float | None:
        """Decay of the moving average, as it is set."""
        return self.ema_decay

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
