"""What is saved of a training beside its engine: where the loop is, and what its source needs to resume."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class SourceState:
    """What a source needs to go on: JSON values, and tensors that are equal on every rank."""

    values: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class LoopState:
    """What the loop itself saves beside the engine and the source."""

    steps_done: int = 0
    skipped_steps: int = 0
    samples: int = 0
    weight: float = 0.0
    rule: str | None = None
    is_judged: bool = True
    """False: the source has not been asked yet whether a rule ends the stage here."""
