"""Denoising diffusion (Ho et al. 2020): diffusers' UNet2DModel and schedulers, with a bound on the likelihood.

B samples, C channels, H and W pixels (or latents), T steps of the noising process. abar: the product of 1 - beta.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from recipes.errors import RequestError
from recipes.image_models import Ddpm
from trainers.data.image_sets import ImageDataset
from trainers.families.diffusers_files import stock_config
from trainers.families.protocol import ImageFacts, Part, PhaseModule, settings_of
from trainers.families.vae import LatentCodec, SpatialAutoencoder
from trainers.randomness import normals, uniforms

NOISE, TIMESTEP, LABEL_DROPOUT, INITIAL = 1, 2, 3, 4
"""Streams of a sample's noise."""
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}
LINEAR_BETAS = (1e-4, 2e-2)
"""Ho et al.'s ends of the linear schedule at 1000 steps; other numbers of steps scale them to the same total."""
SAMPLE_BATCH = 256
WEIGHTS = "diffusion_pytorch_model.safetensors"


class DdpmLosses(nn.Module):
    """Weighted squared error of the prediction per sample; in evaluation also the likelihood bound."""

    def __init__(
        self, net: nn.Module, settings: Ddpm, abar_T: Tensor, num_classes: int, codec: LatentCodec | None
    ) -> None:
        super().__init__()
        self.net = net
        self.settings = settings
        self.num_classes = num_classes
        self._abar_T = abar_T
        self._codec = (codec,)  # in a tuple: its network is no part of this module

    def forward(self, images_BCHW: Tensor, labels_B: Tensor, noise_seeds_B: Tensor, step: int) -> dict[str, Tensor]:
        """Return `loss` (the mean over pixels, min-SNR weighted), `mse` (unweighted), `target_square`.

        In evaluation of pixels also `bits_per_dim`, one draw of the timestep for each sample.
        """
        settings = self.settings
        (codec,) = self._codec
        if codec is None:
            clean = 2 * images_BCHW.float() - 1
        else:
            codec.autoencoder.module.to(images_BCHW.device)
            clean = codec.encode(images_BCHW, noise_seeds_B)
        abar_T = self._abar_T.to(clean.device)
        shape = tuple(clean.shape[1:])
        draws = uniforms(noise_seeds_B, TIMESTEP, (1,), clean)[:, 0]
        timesteps_B = (draws * settings.timesteps).long().clamp(max=settings.timesteps - 1)
        noise = normals(noise_seeds_B, NOISE, shape, clean)
        abar = abar_T[timesteps_B].view(-1, 1, 1, 1)
        noisy = abar.sqrt() * clean + (1 - abar).sqrt() * noise
        labels = self._labels(labels_B, noise_seeds_B)
        predicted = predict(self.net, noisy, timesteps_B, labels)
        target = target_of(settings.prediction, clean, noise, abar)
        mse_B = (predicted - target).square().flatten(1).mean(1)
        found = {
            "loss": loss_weights(abar_T[timesteps_B], settings) * mse_B,
            "mse": mse_B,
            "target_square": target.square().flatten(1).mean(1),
        }
        if not self.training and codec is None:
            recovered = clean_of(settings.prediction, predicted, noisy, abar).clamp(-1, 1)
            found["bits_per_dim"] = bits_per_dim(abar_T, timesteps_B, clean, recovered)
        return found

    def _labels(self, labels_B: Tensor, noise_seeds_B: Tensor) -> Tensor | None:
        """Give the class labels, in training some of them replaced by the one that means none."""
        if not self.settings.class_conditional:
            return None
        if not self.training or not self.settings.is_guidable:
            return labels_B
        like = torch.empty(0, device=labels_B.device)
        is_dropped = uniforms(noise_seeds_B, LABEL_DROPOUT, (1,), like)[:, 0] < self.settings.label_dropout
        return torch.where(is_dropped, self.num_classes, labels_B)


def predict(net: nn.Module, noisy_BCHW: Tensor, timesteps_B: Tensor, labels_B: Tensor | None) -> Tensor:
    """Run the network in its own precision; returns fp32."""
    dtype = next(net.parameters()).dtype
    predicted: Tensor = net(noisy_BCHW.to(dtype), timesteps_B, class_labels=labels_B).sample
    return predicted.float()


def target_of(prediction: str, clean: Tensor, noise: Tensor, abar: Tensor) -> Tensor:
    """Return what the network should predict (Salimans & Ho 2022, section 4, for v)."""
    match prediction:
        case "epsilon":
            return noise
        case "v":
            return abar.sqrt() * noise - (1 - abar).sqrt() * clean
        case "x0":
            return clean
    raise ValueError(f"unknown prediction {prediction!r}")


def clean_of(prediction: str, predicted: Tensor, noisy: Tensor, abar: Tensor) -> Tensor:
    """Return the clean picture that a prediction implies."""
    match prediction:
        case "epsilon":
            return (noisy - (1 - abar).sqrt() * predicted) / abar.sqrt()
        case "v":
            return abar.sqrt() * noisy - (1 - abar).sqrt() * predicted
        case "x0":
            return predicted
    raise ValueError(f"unknown prediction {prediction!r}")


def loss_weights(abar_B: Tensor, settings: Ddpm) -> Tensor:
    """Return min-SNR weights (Hang et al. 2023, section 3.4): min(SNR, gamma) over the SNR that the target implies."""
    if settings.min_snr_gamma is None:
        return torch.ones_like(abar_B)
    snr = abar_B / (1 - abar_B)
    clipped = snr.clamp(max=settings.min_snr_gamma)
    match settings.prediction:
        case "epsilon":
            return clipped / snr
        case "v":
            return clipped / (snr + 1)
        case _:
            return clipped


def bits_per_dim(abar_T: Tensor, timesteps_B: Tensor, clean: Tensor, recovered: Tensor) -> Tensor:
    """Estimate the variational bound from one timestep a sample (Ho et al. 2020, equation 5), in bits a dimension.

    Term t > 0 is a KL between Gaussians of the posterior's variance; term 0 the likelihood of 8-bit values. The sum
    over T terms is T times the drawn one; the prior's term is exact.
    """
    steps = len(abar_T)
    shape = (-1, 1, 1, 1)
    abar = abar_T[timesteps_B].view(shape)
    before = torch.where(timesteps_B > 0, abar_T[(timesteps_B - 1).clamp(min=0)], torch.ones_like(abar_T[0])).view(
        shape
    )
    beta = 1 - abar / before
    posterior_variance = beta * (1 - before) / (1 - abar)
    factor = before.sqrt() * beta / (1 - abar)
    kl = (factor * (clean - recovered)).square() / (2 * posterior_variance.clamp(min=1e-20))
    sd = beta.sqrt()
    upper, lower = (recovered.new_tensor(edge) / 255 for edge in (1, -1))
    normal = torch.distributions.Normal(0.0, 1.0)
    above = torch.where(clean > 0.999, torch.ones_like(clean), normal.cdf((clean + upper - recovered) / sd))
    below = torch.where(clean < -0.999, torch.zeros_like(clean), normal.cdf((clean + lower - recovered) / sd))
    decoder = -(above - below).clamp(min=1e-12).log()
    term_B = torch.where(timesteps_B > 0, kl.flatten(1).sum(1), decoder.flatten(1).sum(1))
    last = abar_T[-1]
    prior_B = 0.5 * (last * clean.square() - last - (1 - last).log()).flatten(1).sum(1)
    dimensions = clean[0].numel()
    return (steps * term_B + prior_B) / (dimensions * math.log(2))


class DdpmFamily:
    """Denoising diffusion as a family."""

    averaged = ""

    def __init__(self, architecture: Ddpm, facts: ImageFacts, codec: LatentCodec | None = None) -> None:
        from diffusers.models.unets.unet_2d import UNet2DModel

        self.facts = facts
        self.settings = architecture
        self.codec = codec
        channels, height, width = self._shape = facts.shape if codec is None else codec.shape
        levels = len(architecture.block_out_channels)
        factor = 2 ** (levels - 1)
        if height % factor or width % factor:
            raise RequestError(
                f"a network of {levels} levels halves the size {levels - 1} times; {height}x{width} is no "
                f"multiple of {factor}: give fewer block_out_channels, or set the source's size"
            )
        if architecture.class_conditional and len(facts.classes) < 2:
            found = "no labels" if not facts.classes else f"one label, {facts.classes[0]!r}, on every picture"
            raise RequestError(f"class_conditional needs pictures of at least two classes; the data has {found}")
        attention = architecture.attention_levels
        num_classes = len(facts.classes)
        self.net = UNet2DModel(
            sample_size=height,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=tuple(architecture.block_out_channels),
            layers_per_block=architecture.layers_per_block,
            down_block_types=tuple("AttnDownBlock2D" if at in attention else "DownBlock2D" for at in range(levels)),
            up_block_types=tuple("AttnUpBlock2D" if at in attention else "UpBlock2D" for at in reversed(range(levels))),
            norm_num_groups=architecture.norm_num_groups,
            attention_head_dim=min(8, *architecture.block_out_channels),
            num_class_embeds=num_classes + architecture.is_guidable if architecture.class_conditional else None,
        )
        self.scheduler = build_scheduler(architecture, "ddpm", is_clipped=codec is None)
        self.module = DdpmLosses(self.net, architecture, self.scheduler.alphas_cumprod.float(), num_classes, codec)

    @property
    def is_conditional(self) -> bool:
        """Whether a picture's class can be asked for."""
        return self.settings.class_conditional

    def phases(self) -> list[PhaseModule]:
        """One: the whole module."""
        return [PhaseModule("", self.module)]

    def parts(self) -> list[Part]:
        """The network in the layout of diffusers' pipelines, beside it the autoencoder of a latent diffusion."""
        parts = [Part("unet", "net.", WEIGHTS, stock_config(self.net))]
        if self.codec is not None:
            model = cast(SpatialAutoencoder, self.codec.autoencoder.net).model
            config = stock_config(model) | {"scaling_factor": self.codec.scale}
            parts.append(Part("vae", "", WEIGHTS, config, dict(model.named_parameters())))
        return parts

    def further_files(self) -> dict[str, Any]:
        """The scheduler; an autoencoder's settings; without both classes and autoencoder DDPMPipeline's index."""
        files: dict[str, Any] = {"scheduler/scheduler_config.json": stock_config(self.scheduler)}
        if self.codec is not None:
            files["vae/image.json"] = settings_of(self.codec.autoencoder.settings, self.facts, torch.float32)
        elif not self.settings.class_conditional:
            files["model_index.json"] = {
                "_class_name": "DDPMPipeline",
                "scheduler": ["diffusers", "DDPMScheduler"],
                "unet": ["diffusers", "UNet2DModel"],
            }
        return files

    @torch.no_grad()
    def outputs(self, images_BCHW: Tensor, labels_B: Tensor) -> Tensor:
        """Return the prediction in the middle of the process, the pictures taken as noisy ones."""
        middle = torch.full((len(images_BCHW),), self.settings.timesteps // 2, device=images_BCHW.device)
        labels = labels_B if self.settings.class_conditional else None
        if self.codec is None:
            return predict(self.net, 2 * images_BCHW - 1, middle, labels)
        seeds = torch.arange(len(images_BCHW))
        return predict(self.net, self.codec.encode(images_BCHW, seeds), middle, labels)

    @torch.no_grad()
    def sample(self, seeds: Sequence[int], labels: Sequence[int] | None = None) -> Tensor:
        """Draw pictures with the recipe's sampler, steps and guidance; each depends on its seed and label alone."""
        if self.settings.class_conditional and labels is None:
            labels = [seed % len(self.facts.classes) for seed in seeds]
        if not self.settings.class_conditional and labels is not None:
            raise RequestError("this model is not class-conditional; leave the label out")
        drawn = [
            self._sample(seeds[start : start + SAMPLE_BATCH], labels and labels[start : start + SAMPLE_BATCH])
            for start in range(0, len(seeds), SAMPLE_BATCH)
        ]
        return torch.cat(drawn)

    def _sample(self, seeds: Sequence[int], labels: Sequence[int] | None) -> Tensor:
        settings = self.settings
        device = next(self.net.parameters()).device
        scheduler = build_scheduler(settings, settings.sampler, is_clipped=self.codec is None)
        scheduler.set_timesteps(settings.sampling_steps)
        noisy = normals(torch.tensor(list(seeds)), INITIAL, self._shape, torch.empty(0, device=device))
        classes = None if labels is None else torch.tensor(list(labels), device=device)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        options = {"generator": generators} if settings.sampler == "ddpm" else {}
        for timestep in scheduler.timesteps:
            timesteps = torch.full((len(seeds),), int(timestep), device=device)
            predicted = self._guided(noisy, timesteps, classes)
            noisy = scheduler.step(predicted, timestep, noisy, **options).prev_sample
        return self.pictures_of(noisy)

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Channels, height and width of what is denoised: pixels, or latents."""
        return self._shape

    def predicted_clean(self, noisy: Tensor, timesteps_B: Tensor, classes_B: Tensor | None) -> Tensor:
        """Return what the guided network takes for the clean picture; pixels are clipped, latents not."""
        abar = self.scheduler.alphas_cumprod.to(noisy)[timesteps_B].view(-1, 1, 1, 1)
        clean = clean_of(self.settings.prediction, self._guided(noisy, timesteps_B, classes_B), noisy, abar)
        return clean.clamp(-1, 1) if self.codec is None else clean

    def pictures_of(self, clean: Tensor) -> Tensor:
        """Return the pictures in [0, 1] of clean values in [-1, 1], or of clean latents."""
        return ((clean + 1) / 2).clamp(0, 1) if self.codec is None else self.codec.decode(clean)

    def _guided(self, noisy: Tensor, timesteps_B: Tensor, classes_B: Tensor | None) -> Tensor:
        """Classifier-free guidance (Ho & Salimans 2022, equation 6, with the scale as w + 1)."""
        if classes_B is None or self.settings.guidance == 1:
            return predict(self.net, noisy, timesteps_B, classes_B)
        none = torch.full_like(classes_B, len(self.facts.classes))
        both = predict(self.net, noisy.repeat(2, 1, 1, 1), timesteps_B.repeat(2), torch.cat([classes_B, none]))
        with_class, without = both.chunk(2)
        return without + self.settings.guidance * (with_class - without)

    def gate_reasons(self, metrics: dict[str, float], dataset: ImageDataset) -> list[str]:
        """The prediction must be better than zero everywhere."""
        if "mse" not in metrics or metrics["mse"] < metrics["target_square"]:
            return []
        return [
            f"held-out error {metrics['mse']:.3f} is not below that of predicting 0, {metrics['target_square']:.3f}"
        ]


def build_scheduler(settings: Ddpm, sampler: str, *, is_clipped: bool) -> Any:
    """Build diffusers' scheduler of a sampler for the settings' noising process; pixels are clipped, latents not."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    scale = 1000 / settings.timesteps
    options: dict[str, Any] = {
        "num_train_timesteps": settings.timesteps,
        "beta_start": LINEAR_BETAS[0] * scale,
        "beta_end": min(LINEAR_BETAS[1] * scale, 0.999),
        "beta_schedule": "linear" if settings.betas == "linear" else "squaredcos_cap_v2",
        "prediction_type": PREDICTIONS[settings.prediction],
        "timestep_spacing": "trailing",
    }
    match sampler:
        case "ddpm":
            return DDPMScheduler(**options, clip_sample=is_clipped)
        case "ddim":
            return DDIMScheduler(**options, clip_sample=is_clipped, set_alpha_to_one=True)
        case "dpm_solver":
            return DPMSolverMultistepScheduler(**options)
    raise ValueError(f"unknown sampler {sampler!r}")
