"""Language modelling with a carried state: a stream's batches go on where the last step ended."""

from torch import nn

from trainers.data.streams import StreamBatch
from trainers.objectives.protocol import ObjectiveOutput


class CarriedLanguageModelObjective:
    """Loss over `StreamBatch`es, of training and of evaluations; the module is `CarriedTokenLosses`."""

    def weight(self, batch: StreamBatch) -> float:
        """Return the number of target tokens."""
        return float(batch.loss_mask_BT.sum())

    def loss(self, module: nn.Module, batch: StreamBatch) -> ObjectiveOutput:
        """Sum the loss over the batch's targets; the lanes keep the state after it."""
        loss_sum, after_SLBH = module(batch, batch.states.read(batch.lanes_B))
        batch.states.write(batch.lanes_B, after_SLBH)
        return ObjectiveOutput(loss_sum, {"loss": (loss_sum.detach(), batch.loss_mask_BT.sum())})
