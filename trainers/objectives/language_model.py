"""Language modelling: the mean negative log-likelihood of the target tokens of the global batch."""

from torch import nn

from trainers.data.batches import TokenBatch
from trainers.objectives.protocol import ObjectiveOutput


class LanguageModelObjective:
    """Loss over `TokenBatch`es; the module is `TokenLosses`, wrapped by an engine or not."""

    def weight(self, batch: TokenBatch) -> float:
        """Return the number of target tokens."""
        return float(batch.loss_mask_BT[:, 1:].sum())

    def loss(self, module: nn.Module, batch: TokenBatch) -> ObjectiveOutput:
        """Sum the loss over the batch's targets."""
        loss_sum = module(batch.input_ids_BT, batch.segment_ids_BT, batch.position_ids_BT, batch.loss_mask_BT)
        return ObjectiveOutput(loss_sum, {"loss": (loss_sum.detach(), batch.loss_mask_BT[:, 1:].sum())})
