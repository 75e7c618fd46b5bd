"""Source to target: the mean negative log-likelihood of the target tokens of the global batch."""

from torch import nn

from trainers.data.batches import Seq2SeqBatch
from trainers.objectives.protocol import ObjectiveOutput


class Seq2SeqObjective:
    """Loss over `Seq2SeqBatch`es; the module is `TargetLosses`, wrapped by an engine or not."""

    def weight(self, batch: Seq2SeqBatch) -> float:
        """Return the number of target tokens."""
        return float(batch.target_mask_BT.sum())

    def loss(self, module: nn.Module, batch: Seq2SeqBatch) -> ObjectiveOutput:
        """Sum the loss over the batch's targets."""
        loss_sum = module(batch)
        return ObjectiveOutput(loss_sum, {"loss": (loss_sum.detach(), batch.target_mask_BT.sum())})
