"""Restoring hidden tokens (Devlin et al. 2019)."""

from torch import nn

from trainers.data.masking import MaskedBatch
from trainers.objectives.protocol import ObjectiveOutput


class MaskedLanguageModelObjective:
    """The mean negative log-likelihood of the hidden tokens of the global batch."""

    def weight(self, batch: MaskedBatch) -> float:
        """Return the number of hidden tokens."""
        return float(batch.hidden_mask_BT.sum())

    def loss(self, module: nn.Module, batch: MaskedBatch) -> ObjectiveOutput:
        """Sum the loss over the batch's hidden tokens."""
        loss_sum, hits = module(batch)
        count = batch.hidden_mask_BT.sum()
        return ObjectiveOutput(loss_sum, {"loss": (loss_sum.detach(), count), "masked_accuracy": (hits.float(), count)})
