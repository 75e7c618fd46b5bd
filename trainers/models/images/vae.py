"""Variational autoencoder (Kingma & Welling 2013): the evidence lower bound with KL warm-up and free bits.

B samples, L latent values, C, H, W pixels.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from recipes.errors import RequestError
from recipes.models.images.vae import Vae
from trainers.data.batches import AFTER_WARM_UP
from trainers.data.dataset import Dataset
from trainers.models.images.networks import NetworkType, build_decoder, build_encoder
from trainers.models.images.protocol import ImageFacts, ImageFamily, Part
from trainers.runtime.randomness import normals, stream_seed, uniforms

LATENT_NOISE, BINARIZE = 1, 2
"""Streams of a sample's noise."""
SCORE_DRAWS = 16
"""Draws of the latents that a score is the mean of."""
MIN_LOG_VARIANCE, MAX_LOG_VARIANCE = -12.0, 8.0
ROWS = 4096
"""Images that the gate's baseline is computed on at most."""


class VectorAutoencoder(nn.Module):
    """Encoder to the mean and log variance of a latent vector, decoder to raw pixel values."""

    def __init__(self, architecture: Vae, facts: ImageFacts) -> None:
        super().__init__()
        kind = cast(NetworkType, architecture.type)
        width, depth, latent = architecture.width, architecture.depth, architecture.latent
        self.encoder = build_encoder(kind, facts.shape, width, depth, 2 * latent)
        self.decoder = build_decoder(kind, facts.shape, width, depth, latent)
        self.latent_shape: tuple[int, ...] = (latent,)

    def posterior(self, inputs_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return (mean, log variance) [B, *latent_shape] of inputs in [-1, 1]."""
        mean, log_variance = self.encoder(inputs_BCHW).chunk(2, dim=1)
        return mean, log_variance

    def raw_pixels(self, latents: Tensor) -> Tensor:
        """Return pixel logits (Bernoulli) or values in about [-1, 1] (Gaussian), [B, C, H, W]."""
        decoded: Tensor = self.decoder(latents)
        return decoded


class SpatialAutoencoder(nn.Module):
    """diffusers' AutoencoderKL behind the same two methods."""

    def __init__(self, architecture: Vae, facts: ImageFacts) -> None:
        super().__init__()
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        if (finding := architecture.size_rule(facts.height, facts.width)) is not None:
            raise RequestError.of(finding)
        levels = architecture.depth
        channels = tuple(architecture.width << level for level in range(levels))
        groups = math.gcd(8, architecture.width)
        self.model = AutoencoderKL(
            in_channels=facts.channels,
            out_channels=facts.channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=channels,
            layers_per_block=1,
            latent_channels=architecture.latent,
            norm_num_groups=groups,
            sample_size=facts.height,
            scaling_factor=1.0,
        )
        self.latent_shape = architecture.latent_shape(facts.height, facts.width)

    def posterior(self, inputs_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return (mean, log variance) [B, *latent_shape] of inputs in [-1, 1]."""
        moments = self.model.quant_conv(self.model.encoder(inputs_BCHW))
        mean, log_variance = moments.chunk(2, dim=1)
        return mean, log_variance

    def raw_pixels(self, latents: Tensor) -> Tensor:
        """Return pixel logits (Bernoulli) or values in about [-1, 1] (Gaussian), [B, C, H, W]."""
        decoded: Tensor = self.model.decoder(self.model.post_quant_conv(latents))
        return decoded


class VaeLosses(nn.Module):
    """Negative evidence lower bound per sample, in nats."""

    def __init__(self, net: VectorAutoencoder | SpatialAutoencoder, architecture: Vae) -> None:
        super().__init__()
        self.net = net
        self.settings = architecture

    def forward(self, images_BCHW: Tensor, labels_B: Tensor, noise_seeds_B: Tensor, step: int) -> dict[str, Tensor]:
        """Return `loss` (KL weighted, warmed up, its free bits not charged), `elbo`, `reconstruction`, `kl`."""
        settings = self.settings
        targets = images_BCHW.float()
        if settings.binarize:
            targets = (uniforms(noise_seeds_B, BINARIZE, tuple(targets.shape[1:]), targets) < targets).float()
        dtype = next(self.net.parameters()).dtype
        mean, log_variance = (part.float() for part in self.net.posterior((2 * targets - 1).to(dtype)))
        log_variance = log_variance.clamp(MIN_LOG_VARIANCE, MAX_LOG_VARIANCE)
        noise = normals(noise_seeds_B, LATENT_NOISE, self.net.latent_shape, mean)
        latents = mean + noise * (0.5 * log_variance).exp()
        raw = self.net.raw_pixels(latents.to(dtype)).float()
        reconstruction_B = -pixel_log_likelihood(raw, targets, settings).flatten(1).sum(1)
        kl_BL = gaussian_kl(mean, log_variance).flatten(1)
        charged_B = kl_BL.clamp(min=settings.free_bits).sum(1) if settings.free_bits else kl_BL.sum(1)
        weight = kl_weight(settings, step)
        kl_B = kl_BL.sum(1)
        return {
            "loss": reconstruction_B + weight * charged_B,
            "elbo": -(reconstruction_B + kl_B),
            "reconstruction": reconstruction_B,
            "kl": kl_B,
        }


def gaussian_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return KL(N(mean, exp(log_variance)) || N(0, 1)) of each latent value (Kingma & Welling 2013, appendix B)."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)


def kl_weight(settings: Vae, step: int) -> float:
    """Return the weight of the KL term at a step: linear from 0 over the warm-up."""
    if step >= settings.kl_warmup_steps:
        return settings.kl_weight
    return settings.kl_weight * step / settings.kl_warmup_steps


def pixel_log_likelihood(raw: Tensor, targets: Tensor, settings: Vae) -> Tensor:
    """Return the log-likelihood of each pixel in nats; for the Gaussian a density of pixels in [0, 1]."""
    if settings.likelihood == "bernoulli":
        return -functional.binary_cross_entropy_with_logits(raw, targets, reduction="none")
    error = ((raw + 1) / 2 - targets) / settings.sd
    return -0.5 * error.square() - math.log(settings.sd) - 0.5 * math.log(2 * math.pi)


class VaeFamily(ImageFamily):
    """The variational autoencoder as a family."""

    settings: Vae
    score_name = "elbo"

    def __init__(self, architecture: Vae, facts: ImageFacts) -> None:
        self.facts = facts
        self.settings = architecture
        self.net: VectorAutoencoder | SpatialAutoencoder
        if architecture.type == "autoencoder_kl":
            self.net = SpatialAutoencoder(architecture, facts)
        else:
            self.net = VectorAutoencoder(architecture, facts)
        self.module = VaeLosses(self.net, architecture)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of an image's latents."""
        return self.net.latent_shape

    def parts(self) -> list[Part]:
        """Our own network, or AutoencoderKL in diffusers' layout."""
        if isinstance(self.net, SpatialAutoencoder):
            from trainers.models.images.diffusers_files import stock_config

            return [Part("", "net.model.", "diffusion_pytorch_model.safetensors", stock_config(self.net.model))]
        return [Part("", "net.", "model.safetensors", None)]

    @torch.no_grad()
    def encode(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the latents of images with values in [0, 1]."""
        dtype = next(self.net.parameters()).dtype
        mean, log_variance = self.net.posterior((2 * images_BCHW - 1).to(dtype))
        log_variance = log_variance.float().clamp(MIN_LOG_VARIANCE, MAX_LOG_VARIANCE)
        return mean.float(), (0.5 * log_variance).exp()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return mean images [B, C, H, W] in [0, 1]."""
        raw = self.net.raw_pixels(latents.to(next(self.net.parameters()).dtype)).float()
        return raw.sigmoid() if self.settings.likelihood == "bernoulli" else ((raw + 1) / 2).clamp(0, 1)

    def outputs(self, images_BCHW: Tensor, labels_B: Tensor) -> Tensor:
        """Return the images decoded from the posterior means."""
        return self.decode(self.encode(images_BCHW)[0])

    def sample(
        self, seeds: Sequence[int], labels: Sequence[int] | None = None, captions: Sequence[str] | None = None
    ) -> Tensor:
        """Decode one draw from the prior for each seed."""
        self.demand_known(labels, captions)
        device = next(self.net.parameters()).device
        like = torch.empty(0, device=device)
        return self.decode(normals(torch.tensor(list(seeds)), LATENT_NOISE, self.net.latent_shape, like))

    def scores(self, images_BCHW: Tensor, names: Sequence[str], seed: int) -> list[dict[str, Any]]:
        """Return the bound in nats, the mean over draws of the latents."""
        labels = torch.full((len(images_BCHW),), -1)
        total = torch.zeros(len(images_BCHW))
        for draw in range(SCORE_DRAWS):
            seeds = torch.tensor([stream_seed(seed, "score", name, draw) for name in names])
            total += self.module(images_BCHW, labels, seeds, AFTER_WARM_UP)["elbo"]
        return [{"image": name, "elbo": float(value) / SCORE_DRAWS} for name, value in zip(names, total, strict=True)]

    def gate_reasons(self, metrics: Mapping[str, float], dataset: Dataset) -> list[str]:
        """The bound must be above the log-likelihood of independent pixels with the training data's means."""
        elbo = metrics.get("elbo")
        if elbo is None:
            return []
        baseline = independent_pixels(dataset, self.settings)
        if elbo > baseline:
            return []
        return [f"held-out bound {elbo:.1f} nats is not above that of independent pixels, {baseline:.1f}"]


def independent_pixels(dataset: Dataset, settings: Vae) -> float:
    """Return the mean log-likelihood of images under independent pixels with the set's own means."""
    images = torch.from_numpy(np.asarray(dataset.images_NCHW[:ROWS], dtype=np.float32) / 255)
    mean = images.mean(0, keepdim=True).clamp(1e-3, 1 - 1e-3)
    raw = torch.logit(mean) if settings.likelihood == "bernoulli" else 2 * mean - 1
    return float(pixel_log_likelihood(raw.expand_as(images), images, settings).flatten(1).sum(1).mean())
