"""Denoising diffusion (Ho et al. 2020): diffusers' networks and schedulers, with a bound on the likelihood.

B samples, C channels, H and W pixels (or latents), T steps of the noising process. abar: the product of 1 - beta.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recipes.errors import RequestError
from recipes.models.images.ddpm import Ddpm
from trainers.data.batches import Texts
from trainers.data.dataset import Dataset
from trainers.models.images.diffusers_files import stock_config
from trainers.models.images.latents import LatentCodec
from trainers.models.images.likelihood_bound import bound_terms, prior_term, strata
from trainers.models.images.protocol import ImageFacts, ImageFamily, Part, demand_classes, settings_of
from trainers.models.images.text_encoder import TextEncoder, TextStates
from trainers.models.images.unet import build_unet
from trainers.runtime.randomness import normals, uniforms

NOISE, TIMESTEP, LABEL_DROPOUT, INITIAL, BOUND_TIMESTEP, BOUND_NOISE = 1, 2, 3, 4, 5, 100
"""Streams of a sample's noise; the last one's are as many as the bound has strata."""
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}
LINEAR_BETAS = (1e-4, 2e-2)
"""Ho et al.'s ends of the linear schedule at 1000 steps; other numbers of steps scale them to the same total."""
SAMPLE_BATCH = 256
PROBE_CAPTIONS = ("a", "a b", "", "b a")
WEIGHTS = "diffusion_pytorch_model.safetensors"


class DdpmLosses(nn.Module):
    """Weighted squared error of the prediction per sample; in evaluation also the likelihood bound."""

    def __init__(
        self,
        net: nn.Module,
        settings: Ddpm,
        abar_T: Tensor,
        num_classes: int,
        codec: LatentCodec | None,
        text: TextEncoder | None,
    ) -> None:
        super().__init__()
        self.net = net
        self.settings = settings
        self.num_classes = num_classes
        self._abar_T = abar_T
        self._codec = (codec,)  # in a tuple: its network is no part of this module
        self._text = (text,)

    def forward(
        self,
        images_BCHW: Tensor,
        labels_B: Tensor,
        noise_seeds_B: Tensor,
        step: int,
        captions: Texts | None = None,
    ) -> dict[str, Tensor]:
        """Return `loss` (the mean over pixels, min-SNR weighted), `mse` (unweighted), `target_square`.

        In evaluation of pixels also `bits_per_dim`, a draw of the timestep in each stratum for each sample.
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
        states = self._states(captions, noise_seeds_B)
        predicted = predict(self.net, noisy, timesteps_B, labels, states)
        target = target_of(settings.prediction, clean, noise, abar)
        mse_B = (predicted - target).square().flatten(1).mean(1)
        found = {
            "loss": loss_weights(abar_T[timesteps_B], settings) * mse_B,
            "mse": mse_B,
            "target_square": target.square().flatten(1).mean(1),
        }
        if not self.training and codec is None:
            found["bits_per_dim"] = self._bits_per_dim(abar_T, clean, labels, states, noise_seeds_B)
        return found

    def _bits_per_dim(
        self, abar_T: Tensor, clean: Tensor, labels: Tensor | None, states: TextStates | None, noise_seeds_B: Tensor
    ) -> Tensor:
        """Estimate the variational bound [B] (Ho et al. 2020, equation 5) in bits a dimension.

        The terms of the first steps are a thousand times those of the last, so each stratum of timesteps gives one
        draw, times its width; the first two steps are strata of their own.
        """
        nats_B = prior_term(abar_T, clean)
        parts = strata(len(abar_T))
        draws = uniforms(noise_seeds_B, BOUND_TIMESTEP, (len(parts),), clean)
        for place, (first, stop) in enumerate(parts):
            within = (draws[:, place] * (stop - first)).long().clamp(max=stop - first - 1)
            noise = normals(noise_seeds_B, BOUND_NOISE + place, tuple(clean.shape[1:]), clean)
            timesteps_B = first + within
            abar = abar_T[timesteps_B].view(-1, 1, 1, 1)
            noisy = abar.sqrt() * clean + (1 - abar).sqrt() * noise
            predicted = predict(self.net, noisy, timesteps_B, labels, states)
            recovered = clean_of(self.settings.prediction, predicted, noisy, abar).clamp(-1, 1)
            nats_B = nats_B + (stop - first) * bound_terms(abar_T, timesteps_B, clean, recovered)
        return nats_B / (clean[0].numel() * math.log(2))

    def _labels(self, labels_B: Tensor, noise_seeds_B: Tensor) -> Tensor | None:
        """Give the class labels, in training some of them replaced by the one that means none."""
        if not self.settings.class_conditional:
            return None
        if not self.training or not self.settings.is_guidable:
            return labels_B
        return torch.where(self._is_dropped(noise_seeds_B, labels_B.device), self.num_classes, labels_B)

    def _states(self, captions: Texts | None, noise_seeds_B: Tensor) -> TextStates | None:
        """Give the captions' hidden states, in training some of them replaced by those of the empty one."""
        (text,) = self._text
        if text is None:
            return None
        assert captions is not None, "a batch without captions"
        if self.training and self.settings.label_dropout > 0:
            captions = text.without(captions, self._is_dropped(noise_seeds_B, captions.input_ids_BT.device))
        return text.states(captions)

    def _is_dropped(self, noise_seeds_B: Tensor, device: torch.device) -> Tensor:
        like = torch.empty(0, device=device)
        return uniforms(noise_seeds_B, LABEL_DROPOUT, (1,), like)[:, 0] < self.settings.label_dropout


def predict(
    net: nn.Module, noisy_BCHW: Tensor, timesteps_B: Tensor, labels_B: Tensor | None, text: TextStates | None = None
) -> Tensor:
    """Run the network in its own precision; returns fp32."""
    dtype = next(net.parameters()).dtype
    given: dict[str, Any] = {"class_labels": labels_B}
    if text is not None:
        given = {"encoder_hidden_states": text.hidden_BTD.to(dtype), "encoder_attention_mask": text.mask_BT}
    predicted: Tensor = net(noisy_BCHW.to(dtype), timesteps_B, **given).sample
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
    """Return the clean image that a prediction implies."""
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


class DdpmFamily(ImageFamily):
    """Denoising diffusion as a family."""

    settings: Ddpm

    def __init__(
        self,
        architecture: Ddpm,
        facts: ImageFacts,
        codec: LatentCodec | None = None,
        text: TextEncoder | None = None,
    ) -> None:
        self.facts = facts
        self.settings = architecture
        self.codec = codec
        self.text = text
        _, height, width = self._shape = facts.shape if codec is None else codec.shape
        finding = architecture.size_rule(height, width, "images" if codec is None else "latents")
        if finding is not None:
            raise RequestError.of(finding)
        if architecture.class_conditional:
            demand_classes(facts.classes, "class_conditional")
        num_classes = len(facts.classes)
        self.net: Any = build_unet(architecture, self._shape, num_classes, None if text is None else text.width)
        self.scheduler = build_scheduler(architecture, "ddpm", is_clipped=codec is None)
        abar_T = self.scheduler.alphas_cumprod.float()
        self.module = DdpmLosses(self.net, architecture, abar_T, num_classes, codec, text)

    @property
    def is_conditional(self) -> bool:
        """Whether an image's class can be asked for."""
        return self.settings.class_conditional

    @property
    def is_captioned(self) -> bool:
        """Whether images are drawn from captions."""
        return self.text is not None

    def parts(self) -> list[Part]:
        """The network in the layout of diffusers' pipelines, beside it the autoencoder of a latent diffusion."""
        parts = [Part("unet", "net.", WEIGHTS, stock_config(self.net))]
        if self.codec is not None:
            parts.append(self.codec.part("vae"))
        return parts

    def further_files(self) -> dict[str, Any]:
        """The scheduler; an autoencoder's settings; without classes, captions and autoencoder DDPMPipeline's index."""
        files: dict[str, Any] = {"scheduler/scheduler_config.json": stock_config(self.scheduler)}
        if self.codec is not None:
            files["vae/image.json"] = settings_of(self.codec.autoencoder.settings, self.facts, torch.float32)
        elif not self.settings.class_conditional and self.text is None:
            files["model_index.json"] = {
                "_class_name": "DDPMPipeline",
                "scheduler": ["diffusers", "DDPMScheduler"],
                "unet": ["diffusers", "UNet2DModel"],
            }
        return files

    @torch.no_grad()
    def outputs(self, images_BCHW: Tensor, labels_B: Tensor) -> Tensor:
        """Return the prediction in the middle of the process, the images taken as noisy ones.

        Where captions condition, they are fixed ones.
        """
        middle = torch.full((len(images_BCHW),), self.settings.timesteps // 2, device=images_BCHW.device)
        labels = labels_B if self.settings.class_conditional else None
        text = None
        if self.text is not None:
            captions = [PROBE_CAPTIONS[number % len(PROBE_CAPTIONS)] for number in range(len(images_BCHW))]
            text = self.text.states(self.text.read(captions).to(images_BCHW.device))
        if self.codec is None:
            return predict(self.net, 2 * images_BCHW - 1, middle, labels, text)
        seeds = torch.arange(len(images_BCHW))
        return predict(self.net, self.codec.encode(images_BCHW, seeds), middle, labels, text)

    @torch.no_grad()
    def sample(
        self, seeds: Sequence[int], labels: Sequence[int] | None = None, captions: Sequence[str] | None = None
    ) -> Tensor:
        """Draw images with the recipe's sampler, steps and guidance.

        Each depends on its seed and its label or caption alone; without them the data's own are taken in turn.
        """
        self.demand_known(labels, captions)
        if self.settings.class_conditional and labels is None:
            labels = [seed % len(self.facts.classes) for seed in seeds]
        if self.text is not None and captions is None:
            captions = [self.facts.captions[number % len(self.facts.captions)] for number in range(len(seeds))]
        parts = [slice(start, start + SAMPLE_BATCH) for start in range(0, len(seeds), SAMPLE_BATCH)]
        return torch.cat(
            [self._sample(seeds[part], labels and labels[part], captions and captions[part]) for part in parts]
        )

    def _sample(
        self, seeds: Sequence[int], labels: Sequence[int] | None, captions: Sequence[str] | None = None
    ) -> Tensor:
        settings = self.settings
        device = next(self.net.parameters()).device
        scheduler = build_scheduler(settings, settings.sampler, is_clipped=self.codec is None)
        scheduler.set_timesteps(settings.sampling_steps)
        noisy = normals(torch.tensor(list(seeds)), INITIAL, self._shape, torch.empty(0, device=device))
        classes = None if labels is None else torch.tensor(list(labels), device=device)
        text = None if captions is None else self._read(captions, device)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        for timestep in scheduler.timesteps:
            timesteps = torch.full((len(seeds),), int(timestep), device=device)
            predicted = self._guided(noisy, timesteps, classes, text)
            noisy = scheduler.step(predicted, timestep, noisy, generator=generators).prev_sample
        return self.images_of(noisy)

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Channels, height and width of what is denoised: pixels, or latents."""
        return self._shape

    @property
    def is_guidable(self) -> bool:
        """Whether the network knows how to do without the label or caption."""
        return self.settings.is_guidable or (self.is_captioned and self.settings.label_dropout > 0)

    def condition(self, captions: Texts) -> TextStates:
        """Return the states of captions, and under guidance after them those of as many empty ones."""
        assert self.text is not None
        return self.text.states(captions if self.settings.guidance == 1 else self.text.with_empty(captions))

    def predicted_clean(
        self, noisy: Tensor, timesteps_B: Tensor, classes_B: Tensor | None, text: TextStates | None = None
    ) -> Tensor:
        """Return what the guided network takes for the clean image; pixels are clipped, latents not.

        `text` is `condition`'s, where captions condition.
        """
        abar = self.scheduler.alphas_cumprod.to(noisy)[timesteps_B].view(-1, 1, 1, 1)
        clean = clean_of(self.settings.prediction, self._guided(noisy, timesteps_B, classes_B, text), noisy, abar)
        return clean.clamp(-1, 1) if self.codec is None else clean

    def images_of(self, clean: Tensor) -> Tensor:
        """Return the images in [0, 1] of clean values in [-1, 1], or of clean latents."""
        return ((clean + 1) / 2).clamp(0, 1) if self.codec is None else self.codec.decode(clean)

    def _read(self, captions: Sequence[str], device: torch.device) -> TextStates:
        """Read captions, and under guidance after them as many empty ones."""
        assert self.text is not None
        empty = [] if self.settings.guidance == 1 else [""] * len(captions)
        return self.text.states(self.text.read([*captions, *empty]).to(device))

    def _guided(
        self, noisy: Tensor, timesteps_B: Tensor, classes_B: Tensor | None, text: TextStates | None = None
    ) -> Tensor:
        """Classifier-free guidance (Ho & Salimans 2022, equation 6, with the scale as w + 1)."""
        if (classes_B is None and text is None) or self.settings.guidance == 1:
            return predict(self.net, noisy, timesteps_B, classes_B, text)
        classes = None
        if classes_B is not None:
            classes = torch.cat([classes_B, torch.full_like(classes_B, len(self.facts.classes))])
        both = predict(self.net, noisy.repeat(2, 1, 1, 1), timesteps_B.repeat(2), classes, text)
        with_class, without = both.chunk(2)
        return without + self.settings.guidance * (with_class - without)

    def gate_reasons(self, metrics: Mapping[str, float], dataset: Dataset) -> list[str]:
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
