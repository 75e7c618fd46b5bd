"""Images as the latents of a frozen autoencoder, in which a diffusion can run."""

import numpy as np
import torch
from torch import Tensor

from recipes.errors import RequestError
from trainers.data.dataset import Dataset
from trainers.models.images.protocol import ImageFamily, Part
from trainers.runtime.randomness import normals

CODEC_NOISE = 8
"""Stream of an image's noise, apart from those of what runs in its latents."""
CODEC_ROWS = 1024


class LatentCodec:
    """A frozen autoencoder between images and latents of about unit variance."""

    def __init__(self, autoencoder: ImageFamily, scale: float) -> None:
        if (finding := autoencoder.settings.latents_rule()) is not None:
            raise RequestError.of(finding)
        self.autoencoder = autoencoder
        self.autoencoder.module.eval().requires_grad_(False)
        self.scale = scale
        """What latents are multiplied with."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels, height and width of the latents."""
        return self.autoencoder.latent_shape

    def part(self, folder: str) -> Part:
        """Return the autoencoder's network and files, as a part of what runs in its latents."""
        (own,) = self.autoencoder.parts()
        tensors = {
            name.removeprefix(own.prefix): parameter
            for name, parameter in self.autoencoder.module.named_parameters()
            if name.startswith(own.prefix)
        }
        config = None if own.config is None else own.config | {"scaling_factor": self.scale}
        return Part(folder, "", own.weights, config, tensors)

    def encode(self, images_BCHW: Tensor, noise_seeds_B: Tensor) -> Tensor:
        """Draw scaled latents of images with values in [0, 1]."""
        mean, deviation = self.autoencoder.encode(images_BCHW)
        return self.scale * (mean + deviation * normals(noise_seeds_B, CODEC_NOISE, self.shape, mean))

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Return images in [0, 1]."""
        return self.autoencoder.decode(latents_BCHW / self.scale)


def fit_codec(autoencoder: ImageFamily, dataset: Dataset) -> LatentCodec:
    """Make a codec whose scale brings the latents of the set's first images to unit variance."""
    codec = LatentCodec(autoencoder, 1.0)
    images = torch.from_numpy(np.asarray(dataset.images_NCHW[:CODEC_ROWS], dtype=np.float32) / 255)
    latents = torch.cat([codec.encode(part, torch.arange(len(part))) for part in images.split(128)])
    return LatentCodec(autoencoder, 1.0 / float(latents.std()))
