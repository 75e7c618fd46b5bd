"""Several engines saved and restored as one; their parameters' names differ."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from trainers.engine.protocol import ReadState, StatefulEngine, StateSlice

BASE = 2**40
"""Counts of applied steps are digits to this base, the first engine's last; engines may have skipped others' steps."""


class JointState:
    """The state of engines that train in turn."""

    def __init__(self, engines: Sequence[StatefulEngine]) -> None:
        self._engines = list(engines)

    @property
    def device(self) -> torch.device:
        """Where the first engine's batches have to be."""
        return self._engines[0].device

    @property
    def description(self) -> str:
        """Every engine's."""
        return "; ".join(engine.description for engine in self._engines)

    @property
    def steps_applied(self) -> int:
        """All counts as one number."""
        return sum(engine.steps_applied * BASE**place for place, engine in enumerate(self._engines))

    def state_out(self) -> Iterator[StateSlice]:
        """Yield every engine's share."""
        for engine in self._engines:
            yield from engine.state_out()

    def full_parameters(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield every engine's parameters."""
        for engine in self._engines:
            yield from engine.full_parameters(names)

    def state_in(self, read: ReadState, *, steps_applied: int) -> None:
        """Fill every engine."""
        for engine in self._engines:
            steps_applied, own = divmod(steps_applied, BASE)
            engine.state_in(read, steps_applied=own)
