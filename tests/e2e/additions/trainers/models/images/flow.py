"""Rectified flow (Liu et al. 2022): a network learns the velocity of straight paths from noise to images.

B samples, C channels, H and W pixels.
"""

from collections.abc import Mapping, Sequence

import torch
from recipes.models.images.flow import Flow
from torch import Tensor, nn

from trainers.data.dataset import Dataset
from trainers.models.images.networks import build_decoder, build_encoder
from trainers.models.images.protocol import ImageFacts, ImageFamily, Part
from trainers.runtime.randomness import normals, uniforms

NOISE, TIME, INITIAL = 1, 2, 3


class Velocity(nn.Module):
    """The velocity at points of paths, and times in [0, 1]."""

    def __init__(self, settings: Flow, facts: ImageFacts) -> None:
        super().__init__()
        self.encoder = build_encoder("mlp", facts.shape, settings.width, settings.depth, settings.width)
        self.decoder = build_decoder("mlp", facts.shape, settings.width, settings.depth, settings.width + 1)

    def forward(self, points_BCHW: Tensor, times_B1: Tensor) -> Tensor:
        """Return velocities [B, C, H, W]."""
        hidden = self.encoder(points_BCHW.to(next(self.parameters()).dtype))
        return self.decoder(torch.cat([hidden, times_B1.to(hidden.dtype)], dim=1)).float()


class FlowLosses(nn.Module):
    """Squared error of the velocity per sample."""

    def __init__(self, net: Velocity) -> None:
        super().__init__()
        self.net = net

    def forward(self, images_BCHW: Tensor, labels_B: Tensor, noise_seeds_B: Tensor, step: int) -> dict[str, Tensor]:
        """Return `loss`, and the mean square of the velocity itself."""
        clean = 2 * images_BCHW.float() - 1
        noise = normals(noise_seeds_B, NOISE, tuple(clean.shape[1:]), clean)
        times_B1 = uniforms(noise_seeds_B, TIME, (1,), clean)
        share = times_B1[:, :, None, None]
        velocity = clean - noise
        found = self.net((1 - share) * noise + share * clean, times_B1)
        return {
            "loss": (found - velocity).square().flatten(1).mean(1),
            "target_square": velocity.square().flatten(1).mean(1),
        }


class FlowFamily(ImageFamily):
    """A rectified flow."""

    settings: Flow

    def __init__(self, settings: Flow, facts: ImageFacts) -> None:
        self.settings, self.facts = settings, facts
        self.net = Velocity(settings, facts)
        self.module = FlowLosses(self.net)

    def parts(self) -> list[Part]:
        """One network of our own class."""
        return [Part("", "net.", "model.safetensors", None)]

    @torch.no_grad()
    def outputs(self, images_BCHW: Tensor, labels_B: Tensor) -> Tensor:
        """Return the velocity half-way."""
        return self.net(2 * images_BCHW - 1, torch.full_like(images_BCHW[:, :1, 0, 0], 0.5))

    @torch.no_grad()
    def sample(
        self, seeds: Sequence[int], labels: Sequence[int] | None = None, captions: Sequence[str] | None = None
    ) -> Tensor:
        """Follow the velocity from each seed's noise."""
        self.demand_known(labels, captions)
        like = torch.empty(0, device=next(self.net.parameters()).device)
        points = normals(torch.tensor(list(seeds)), INITIAL, self.facts.shape, like)
        for step in range(self.settings.sampling_steps):
            times = torch.full_like(points[:, :1, 0, 0], step / self.settings.sampling_steps)
            points = points + self.net(points, times) / self.settings.sampling_steps
        return ((points + 1) / 2).clamp(0, 1)

    def gate_reasons(self, metrics: Mapping[str, float], dataset: Dataset) -> list[str]:
        """The velocity must be better than zero everywhere."""
        if "loss" not in metrics or metrics["loss"] < metrics["target_square"]:
            return []
        return [f"held-out error {metrics['loss']:.3f} is not below that of predicting 0"]
