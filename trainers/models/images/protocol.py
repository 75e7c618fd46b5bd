"""What a family of image models is: a module that gives losses per sample, and what is done with it when trained.

B samples, C channels, H and W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from recipes.models.images.architecture import ImageArchitecture
from recipes.models.images.folders import FORMAT
from trainers.data.dataset import Dataset


@dataclass(frozen=True)
class ImageFacts:
    """What a model takes from its data."""

    channels: int
    height: int
    width: int
    classes: tuple[str, ...]
    captions: tuple[str, ...] = ()
    """Some of the data's, where they condition: what is drawn where nothing is asked for."""

    @classmethod
    def of(cls, dataset: Dataset, captions: tuple[str, ...] = ()) -> "ImageFacts":
        """Return the facts of a set."""
        return cls(*dataset.shape, dataset.classes, captions)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return (self.channels, self.height, self.width)


def settings_of(architecture: ImageArchitecture, facts: ImageFacts, dtype: torch.dtype) -> dict[str, Any]:
    """Return what a model folder says of itself: family, configuration, images, classes."""
    return {
        "format": FORMAT,
        "family": architecture.family,
        "architecture": architecture.model_dump(mode="json"),
        "dtype": str(dtype).removeprefix("torch."),
        "channels": facts.channels,
        "height": facts.height,
        "width": facts.width,
        "classes": list(facts.classes),
        **({"captions": list(facts.captions)} if facts.captions else {}),
    }


@dataclass(frozen=True)
class Part:
    """A network with files of its own inside the artifact's model folder."""

    folder: str
    """Relative to the model folder; empty for the folder itself."""
    prefix: str
    """What its parameters' names start with in the family's module."""
    weights: str
    """Name of the safetensors file: `model.safetensors`, or diffusers' own."""
    config: dict[str, Any] | None
    """Content of config.json where a stock class opens the part."""
    frozen: dict[str, Tensor] | None = None
    """Tensors of a network that was not trained here, by their names in the file."""


@dataclass(frozen=True)
class PhaseModule:
    """A module that trains with an engine of its own, in turn with the family's others."""

    name: str
    """Empty where there is one phase."""
    module: nn.Module
    """Forward as the family's own; its parameters have the names that they have in the family's module."""
    lr_ratio: float = 1.0
    """Its learning rate over the recipe's."""
    loss_name: str = "loss"
    """The metric that its loss is reported as."""


class Family(Protocol):
    """A model of images, in training or trained; `module` has no buffers that training changes."""

    @property
    def facts(self) -> ImageFacts:
        """The images it was made for."""

    @property
    def module(self) -> nn.Module:
        """Forward: (images_BCHW in [0, 1], labels_B, noise_seeds_B, step) -> {metric: [B]}, with `loss` the objective.

        Where batches have captions they come as `captions`. All noise follows from the seeds; no sample's values depend
        on another's.
        """

    @property
    def averaged(self) -> str:
        """What the names of parameters start with whose moving average is kept; empty: all."""

    def phases(self) -> list[PhaseModule]:
        """Name what is trained, in its order within a step; the first phase's module serves the evaluation too."""

    def parts(self) -> list[Part]:
        """Name the networks and their files."""

    def further_files(self) -> dict[str, Any]:
        """Name further JSON files that the ecosystem's layout wants (a scheduler's, a pipeline's)."""

    def outputs(self, images_BCHW: Tensor, labels_B: Tensor) -> Tensor:
        """Return raw outputs on given images without noise: what a re-opened model must reproduce."""

    def gate_reasons(self, metrics: dict[str, float], dataset: Dataset) -> list[str]:
        """Say why later stages should not build on a model with these held-out metrics: no better than a guess."""


@runtime_checkable
class Drawing(Protocol):
    """A family that draws images."""

    @property
    def facts(self) -> ImageFacts:
        """The images it was made for."""

    @property
    def is_conditional(self) -> bool:
        """Whether an image's class can be asked for."""

    def sample(self, seeds: Sequence[int], labels: Sequence[int] | None = None) -> Tensor:
        """Draw one image [C, H, W] in [0, 1] for each seed; an image depends on its seed and label alone."""


@runtime_checkable
class Captioned(Protocol):
    """A family that may draw from captions."""

    @property
    def facts(self) -> ImageFacts:
        """The images it was made for, with captions of the data."""

    @property
    def is_captioned(self) -> bool:
        """Whether it does."""

    def sample(
        self, seeds: Sequence[int], labels: Sequence[int] | None = None, captions: Sequence[str] | None = None
    ) -> Tensor:
        """Draw one image [C, H, W] in [0, 1] for each seed, from its caption."""
