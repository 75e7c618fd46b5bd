"""Images: the mean of the family's losses per sample over the real samples of the global batch."""

import torch
from torch import Tensor, nn

from trainers.data.batches import ImageBatch
from trainers.objectives.protocol import ObjectiveOutput


class ImageObjective:
    """Loss over `ImageBatch`es; the module is a family's or a phase's, wrapped by an engine or not."""

    def __init__(self, loss_name: str = "loss") -> None:
        self._loss_name = loss_name

    def weight(self, batch: ImageBatch) -> float:
        """Return the number of samples that are no fillers."""
        return float((batch.sample_ids_B >= 0).sum())

    def loss(self, module: nn.Module, batch: ImageBatch) -> ObjectiveOutput:
        """Sum the losses over the batch's real samples."""
        given = {} if batch.captions is None else {"captions": batch.captions}
        found: dict[str, Tensor] = module(batch.images_BCHW, batch.labels_B, batch.noise_seeds_B, batch.step, **given)
        is_real_B = batch.sample_ids_B >= 0
        zero = torch.zeros((), device=is_real_B.device)
        sums = {name: torch.where(is_real_B, values, zero).sum() for name, values in found.items()}
        count = is_real_B.sum()
        metrics: dict[str, tuple[Tensor | float, Tensor | float]] = {
            self._loss_name if name == "loss" else name: (value.detach(), count) for name, value in sums.items()
        }
        return ObjectiveOutput(sums["loss"], metrics)
