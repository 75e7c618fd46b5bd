"""What a batch means: its weight in the global mean, its loss sum and its metrics."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn


@dataclass(frozen=True)
class ObjectiveOutput:
    """`loss_sum` is a sum over what `weight` counts, never a mean."""

    loss_sum: Tensor
    metrics: dict[str, tuple[Tensor | float, Tensor | float]] = field(default_factory=dict)
    """(sum, weight) each, added over micro-batches and ranks."""
    maxima: dict[str, Tensor] = field(default_factory=dict)
    """Metrics of which the largest over micro-batches and ranks counts."""


class Objective(Protocol):
    """Turns a micro-batch into a loss; stateless over steps."""

    def weight(self, batch: Any) -> float:
        """Return what the batch counts in the step's mean: tokens, pairs; known before the forward."""

    def loss(self, module: nn.Module, batch: Any) -> ObjectiveOutput:
        """Run the forward(s) of one micro-batch."""


def unchanged(batch: Any, step: int) -> Any:
    """Give a batch as it was read."""
    return batch


@dataclass(frozen=True)
class Learning:
    """What a model learns: its objective over which module, and what the objective reads of a packed batch."""

    module: nn.Module
    objective: Objective
    prepare: Callable[[Any, int], Any] = unchanged
    predicts_next: bool = True
    """Whether a counted model measures the same."""
