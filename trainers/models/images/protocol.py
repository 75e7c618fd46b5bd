"""What a family of image models is: a module that gives losses per sample, and what is done with it when trained.

B samples, C channels, H and W pixels.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from recipes.errors import RequestError
from recipes.models.images.base import ImageModel
from recipes.models.images.folders import FORMAT
from trainers.data.dataset import Dataset
from trainers.objectives.images import ImageObjective
from trainers.runtime.randomness import stream_seed


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


def settings_of(architecture: ImageModel, facts: ImageFacts, dtype: torch.dtype) -> dict[str, Any]:
    """Return what a model folder says of itself: family, configuration, images, classes."""
    return {
        "format": FORMAT,
        "family": architecture.kind(),
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
    frozen: Mapping[str, Tensor] | None = None
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
    objective: ImageObjective = field(default_factory=ImageObjective)


class ImageFamily(ABC):
    """A model of a family of image models, in training or trained; `families.py` builds one.

    What it can do, its settings say: `draws`, `classifies`, `has_latents`. Methods that are for others raise TypeError.
    """

    averaged: ClassVar[str] = ""
    """What the names of parameters start with whose moving average is kept; empty: all."""
    score_name: ClassVar[str | None] = None
    """By which of `scores` images are ranked; None: it scores none."""
    settings: ImageModel
    """The recipe's keys."""
    facts: ImageFacts
    """The images it was made for."""
    net: Any
    """The network that adapters go on."""
    module: nn.Module
    """Forward: (images_BCHW in [0, 1], labels_B, noise_seeds_B, step) -> {metric: [B]}, with `loss` the objective.

    Where batches have captions they come as `captions`. All noise follows from the seeds; no sample's values depend on
    another's. It has no buffers that training changes.
    """

    @property
    def is_conditional(self) -> bool:
        """Whether an image's class can be asked for."""
        return False

    @property
    def is_captioned(self) -> bool:
        """Whether images are drawn from captions."""
        return False

    def phases(self) -> list[PhaseModule]:
        """Name what is trained, in its order within a step; the first phase serves the evaluation too."""
        return [PhaseModule("", self.module)]

    @abstractmethod
    def parts(self) -> list[Part]:
        """Name the networks and their files."""

    def further_files(self) -> dict[str, Any]:
        """Name further JSON files that the ecosystem's layout wants (a scheduler's, a pipeline's)."""
        return {}

    @abstractmethod
    def outputs(self, images_BCHW: Tensor, labels_B: Tensor) -> Tensor:
        """Return raw outputs on given images without noise: what a re-opened model must reproduce."""

    @abstractmethod
    def gate_reasons(self, metrics: Mapping[str, float], dataset: Dataset) -> list[str]:
        """Say why later stages should not build on a model with these held-out metrics: no better than a guess."""

    def sample(
        self, seeds: Sequence[int], labels: Sequence[int] | None = None, captions: Sequence[str] | None = None
    ) -> Tensor:
        """Draw one image [C, H, W] in [0, 1] for each seed; it depends on its seed, label and caption alone."""
        raise self._lacks("draws no images")

    def turns(self, count: int) -> list[int] | None:
        """Return the class of each of so many images, every class in turn; None: no class can be asked for."""
        return [number % len(self.facts.classes) for number in range(count)] if self.is_conditional else None

    def grid(self, count: int, seed: int) -> Tensor:
        """Draw images at fixed seeds; where the family knows classes or captions, each in turn."""
        return self.sample(grid_seeds(count, seed), self.turns(count))

    def demand_known(self, labels: Sequence[int] | None, captions: Sequence[str] | None) -> None:
        """Raise RequestError for conditions that the model does not know."""
        if labels is not None and not self.is_conditional:
            raise RequestError("this model is not class-conditional; leave the label out")
        if captions is not None and not self.is_captioned:
            raise RequestError("this model reads no captions; leave the prompt out")

    def predict(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return (probabilities [B, classes], features [B, F])."""
        raise self._lacks("tells no classes apart")

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of an image's latents."""
        raise self._lacks("has no latents")

    def encode(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the latents of images with values in [0, 1]."""
        raise self._lacks("has no latents")

    def decode(self, latents: Tensor) -> Tensor:
        """Return images [B, C, H, W] in [0, 1]."""
        raise self._lacks("has no latents")

    def interpolate(self, first_CHW: Tensor, second_CHW: Tensor, steps: int) -> Tensor:
        """Decode `steps` latents evenly on the line between those of two images, ends included."""
        means, _ = self.encode(torch.stack([first_CHW, second_CHW]))
        shares = torch.linspace(0, 1, steps, device=means.device).view(-1, *[1] * (means.ndim - 1))
        return self.decode(means[:1] + shares * (means[1:] - means[:1]))

    def scores(self, images_BCHW: Tensor, names: Sequence[str], seed: int) -> list[dict[str, Any]]:
        """Return what each image is scored with, `score_name` among it; draws follow from the seed and the names."""
        raise self._lacks("gives no score of a single image")

    def _lacks(self, what: str) -> TypeError:
        return TypeError(f"{self.settings.noun} {what}")


def grid_seeds(count: int, seed: int) -> list[int]:
    """Return the seeds of a grid's images."""
    return [stream_seed(seed, "grid", number) for number in range(count)]


def demand_classes(classes: Sequence[str], reader: str) -> None:
    """Raise RequestError for data of fewer than two classes, which `reader` needs."""
    if len(classes) < 2:
        found = "no labels" if not classes else f"one label, {classes[0]!r}, on every image"
        raise RequestError(f"{reader} needs images of at least two classes; the data has {found}")
