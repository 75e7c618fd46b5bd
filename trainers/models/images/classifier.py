"""Image classifier: cross-entropy with the labels; its last hidden layer is the feature network of image metrics."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from recipes.errors import RequestError
from recipes.models.images.classifier import Classifier
from trainers.data.dataset import Dataset
from trainers.models.images.networks import build_encoder
from trainers.models.images.protocol import ImageFacts, Part, PhaseModule


class ClassifierNetwork(nn.Module):
    """Features, and class scores linear in them."""

    def __init__(self, architecture: Classifier, facts: ImageFacts) -> None:
        super().__init__()
        self.body = build_encoder(
            architecture.type, facts.shape, architecture.width, architecture.depth, architecture.features
        )
        self.head = nn.Linear(architecture.features, len(facts.classes))

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return (logits [B, classes], features [B, F]) of images with values in [0, 1]."""
        inputs = (2 * images_BCHW - 1).to(self.head.weight.dtype)
        features = functional.silu(self.body(inputs))
        return self.head(features), features


class ClassifierLosses(nn.Module):
    """Cross-entropy per sample."""

    def __init__(self, net: ClassifierNetwork, label_smoothing: float) -> None:
        super().__init__()
        self.net = net
        self.label_smoothing = label_smoothing

    def forward(self, images_BCHW: Tensor, labels_B: Tensor, noise_seeds_B: Tensor, step: int) -> dict[str, Tensor]:
        """Return `loss` (smoothed only in training) and `accuracy`."""
        logits, _ = self.net(images_BCHW)
        smoothing = self.label_smoothing if self.training else 0.0
        loss = functional.cross_entropy(logits.float(), labels_B, reduction="none", label_smoothing=smoothing)
        return {"loss": loss, "accuracy": (logits.argmax(-1) == labels_B).float()}


class ClassifierFamily:
    """The classifier as a family."""

    averaged = ""

    def __init__(self, architecture: Classifier, facts: ImageFacts) -> None:
        if len(facts.classes) < 2:
            found = "no labels" if not facts.classes else f"one label, {facts.classes[0]!r}, on every image"
            raise RequestError(f"a classifier needs images of at least two classes; the data has {found}")
        self.facts = facts
        self.net = ClassifierNetwork(architecture, facts)
        self.module = ClassifierLosses(self.net, architecture.label_smoothing)

    def phases(self) -> list[PhaseModule]:
        """One: the whole module."""
        return [PhaseModule("", self.module)]

    def parts(self) -> list[Part]:
        """One network of our own class."""
        return [Part("", "net.", "model.safetensors", None)]

    def further_files(self) -> dict[str, Any]:
        """None."""
        return {}

    @torch.no_grad()
    def outputs(self, images_BCHW: Tensor, labels_B: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.net(images_BCHW)[0]
        return logits

    @torch.no_grad()
    def predict(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return (probabilities [B, classes], features [B, F])."""
        logits, features = self.net(images_BCHW)
        return logits.float().softmax(-1), features.float()

    def gate_reasons(self, metrics: dict[str, float], dataset: Dataset) -> list[str]:
        """Held-out accuracy must be above that of always naming the commonest class."""
        accuracy = metrics.get("accuracy")
        common = float(max((dataset.labels_N == place).mean() for place in range(len(dataset.classes))))
        if accuracy is None or accuracy > common:
            return []
        return [f"held-out accuracy {accuracy:.3f} is not above the commonest class's share, {common:.3f}"]
