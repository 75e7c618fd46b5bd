"""What a suite of an evaluation is: it measures every model of the stage and says what it found."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn

from recipes.models.model_kinds import ModelKind
from recipes.stages.base import StageBase
from recipes.stages.evaluate import Evaluate
from trainers.models.stack import load_exact
from trainers.runtime.precision import dtype_of
from trainers.training.context import StageContext, model_weights

REFERENCE = "reference"
"""Under this name the data's own answer stands among the samples."""


@dataclass(frozen=True)
class Measured:
    """What a suite found; metrics are equal on all ranks, or rank 0's alone."""

    metrics: Mapping[str, float]
    """By `model.metric`."""
    samples: Sequence[dict[str, Any]] = ()
    """Lines for the report: {prompt, model, response, ...}, or {model, image, caption}."""
    rows: Mapping[str, Sequence[dict[str, Any]]] = field(default_factory=dict)
    """Lines for each case of a benchmark, by its name."""


@dataclass(frozen=True)
class Parts:
    """A suite's parts among those of the stage, one a model, as its progress is shown."""

    first: int
    planned: int

    def place(self, index: int, step: int = 0, steps: int = 1) -> dict[str, int]:
        """Return where the stage is: at a step of the suite's part number `index`, each of as many steps."""
        return {"step": (self.first + index) * steps + step, "steps_planned": self.planned * steps}


class Suite(Protocol):
    """Measures the models of a stage; collective."""

    def __call__(self, spec: Evaluate, context: StageContext, labels: Sequence[str], parts: Parts) -> Measured:
        """Measure each model, named by its label in the metrics."""


def open_measured(spec: StageBase, context: StageContext, field_path: str, kind: ModelKind) -> nn.Module:
    """Return a model in evaluation mode on this rank's device; adapters stay apart where merging would round."""
    device = context.ranks.device
    context.observer.phase("model")
    weights = model_weights(context, field_path)
    model: nn.Module = load_exact(weights, kind, device=device, dtype=dtype_of(spec.shard.precision))
    return model.to(device).eval().requires_grad_(False)
