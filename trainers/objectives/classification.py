"""Classification of texts: cross-entropy with labels, and with the model's own confident guesses where there is none.

B labelled rows, U rows without a label, C classes.
"""

from typing import Any

import torch
from torch import Tensor, nn

from recipes.models.encoder import PseudoLabels
from trainers.data.batches import LabelledBatch, Texts
from trainers.objectives.protocol import ObjectiveOutput


class ClassLosses(nn.Module):
    """A sequence classifier of transformers whose forward returns losses and logits."""

    def __init__(self, model: nn.Module, pseudo_labels: PseudoLabels | None = None) -> None:
        super().__init__()
        self.model = model
        self._pseudo_labels = pseudo_labels

    def forward(self, batch: LabelledBatch) -> dict[str, Tensor]:
        """Return `losses` [B] and `logits` [B, C]; of unlabelled rows `pseudo_losses`, `is_confident` [U]."""
        logits_BC = self._logits(batch.texts)
        losses_B = nn.functional.cross_entropy(logits_BC, batch.labels_B, reduction="none", ignore_index=-1)
        found = {"losses": losses_B, "logits": logits_BC}
        if batch.unlabelled is not None and batch.augmented is not None:
            assert self._pseudo_labels is not None
            was_training = self.model.training
            self.model.eval()
            with torch.no_grad():
                confidence_U, guesses_U = torch.softmax(self._logits(batch.unlabelled), dim=1).max(dim=1)
            self.model.train(was_training)
            is_confident_U = confidence_U >= self._pseudo_labels.threshold
            again_U = nn.functional.cross_entropy(self._logits(batch.augmented), guesses_U, reduction="none")
            found |= {"pseudo_losses": again_U * is_confident_U, "is_confident": is_confident_U.float()}
        return found

    def _logits(self, texts: Texts) -> Tensor:
        model: Any = self.model
        logits: Tensor = model(input_ids=texts.input_ids_BT, attention_mask=texts.attention_mask_BT.long()).logits
        return logits.float()


class ClassificationObjective:
    """The mean over the labelled rows of the global batch; pseudo-labels add their mean, weighted."""

    def __init__(self, pseudo_labels: PseudoLabels | None = None) -> None:
        self._pseudo_labels = pseudo_labels

    def weight(self, batch: LabelledBatch) -> float:
        """Return the number of labelled rows that are no fillers."""
        return float((batch.labels_B >= 0).sum())

    def loss(self, module: nn.Module, batch: LabelledBatch) -> ObjectiveOutput:
        """Sum the losses over the batch."""
        found = module(batch)
        count = (batch.labels_B >= 0).sum()
        loss_sum = found["losses"].sum()
        hits = (found["logits"].argmax(dim=1) == batch.labels_B).sum()
        metrics: dict[str, tuple[Tensor | float, Tensor | float]] = {"accuracy": (hits.float(), count)}
        if "pseudo_losses" in found and self._pseudo_labels is not None:
            rows = float(len(found["is_confident"]))
            pseudo_sum = found["pseudo_losses"].sum()
            metrics["pseudo_loss"] = (pseudo_sum.detach(), rows)
            metrics["pseudo_share"] = (found["is_confident"].sum(), rows)
            metrics["loss"] = (loss_sum.detach(), count)
            loss_sum = loss_sum + pseudo_sum * (self._pseudo_labels.weight / self._pseudo_labels.ratio)
        else:
            metrics["loss"] = (loss_sum.detach(), count)
        return ObjectiveOutput(loss_sum, metrics)
