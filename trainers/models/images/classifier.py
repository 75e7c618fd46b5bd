"""Image classifier: cross-entropy with the labels; its last hidden layer is the feature network of image metrics."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from recipes.models.images.classifier import Classifier
from trainers.data.dataset import Dataset
from trainers.models.images.networks import build_encoder
from trainers.models.images.protocol import ImageFacts, ImageFamily, Part, demand_classes


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


class ClassifierFamily(ImageFamily):
    """The classifier as a family."""

    settings: Classifier
    score_name = "confidence"

    def __init__(self, architecture: Classifier, facts: ImageFacts) -> None:
        demand_classes(facts.classes, "a classifier")
        self.settings = architecture
        self.facts = facts
        self.net = ClassifierNetwork(architecture, facts)
        self.module = ClassifierLosses(self.net, architecture.label_smoothing)

    def parts(self) -> list[Part]:
        """One network of our own class."""
        return [Part("", "net.", "model.safetensors", None)]

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

    def scores(self, images_BCHW: Tensor, names: Sequence[str], seed: int) -> list[dict[str, Any]]:
        """Return the likeliest class and its probability."""
        confidence, label = self.predict(images_BCHW)[0].max(-1)
        return [
            {"image": name, "label": self.facts.classes[int(place)], "confidence": float(value)}
            for name, place, value in zip(names, label, confidence, strict=True)
        ]

    def gate_reasons(self, metrics: Mapping[str, float], dataset: Dataset) -> list[str]:
        """Held-out accuracy must be above that of always naming the commonest class."""
        accuracy = metrics.get("accuracy")
        common = float(max((dataset.labels_N == place).mean() for place in range(len(dataset.classes))))
        if accuracy is None or accuracy > common:
            return []
        return [f"held-out accuracy {accuracy:.3f} is not above the commonest class's share, {common:.3f}"]
