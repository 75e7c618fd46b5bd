"""Language modelling of rows with images: the mean negative log-likelihood of the global batch's target tokens."""

from torch import nn

from trainers.data.batches import ImageTextBatch
from trainers.objectives.protocol import ObjectiveOutput


class ImageTextObjective:
    """Loss over `ImageTextBatch`es; the module is `ImageTextTokenLosses`, wrapped by an engine or not."""

    def weight(self, batch: ImageTextBatch) -> float:
        """Return the number of target tokens."""
        return float(batch.tokens.loss_mask_BT[:, 1:].sum())

    def loss(self, module: nn.Module, batch: ImageTextBatch) -> ObjectiveOutput:
        """Sum the loss over the batch's targets."""
        loss_sum = module(batch)
        count = batch.tokens.loss_mask_BT[:, 1:].sum()
        return ObjectiveOutput(loss_sum, {"loss": (loss_sum.detach(), count)})
