"""The moving average of trained weights, which image models are kept and drawn from."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trainers.engine.protocol import Engine


@dataclass
class MovingAverage:
    """Starts at the weights after the first step, with a decay that rises to its value: (1 + n) / (10 + n)."""

    engines: Sequence[Engine]
    decay: float | None
    """None: no average is kept."""
    averaged: str = ""
    """What the names of averaged parameters start with."""
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def move(self, steps_done: int) -> None:
        """Take the weights after a step in; collective."""
        if self.decay is None:
            return
        decay = min(self.decay, (1 + steps_done) / (10 + steps_done))
        for name, tensor in self._parameters():
            if not name.startswith(self.averaged):
                continue
            if name in self.tensors:
                self.tensors[name].lerp_(tensor.float(), 1 - decay)
            else:
                self.tensors[name] = tensor.float().clone()

    def weights(self) -> dict[str, Tensor]:
        """Return the parameters that are kept: the average where there is one; collective."""
        return {name: tensor.clone() for name, tensor in self._parameters()} | self.tensors

    def _parameters(self) -> Iterator[tuple[str, Tensor]]:
        for engine in self.engines:
            yield from engine.full_parameters()
