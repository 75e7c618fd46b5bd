"""The plain engine: torch autograd and AdamW without DeepSpeed; the oracle that the sharded engine is held against.

In a process group it sums gradients over the ranks itself; nothing is sharded.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainers.engine.flat_adamw import FlatAdamW, split_by_decay
from trainers.engine.protocol import STATE_GROUPS, ParameterGroup, ReadState, StateSlice, StepInfo
from trainers.runtime import distributed


class PlainEngine:
    """Engine over one module that every rank holds whole."""

    def __init__(
        self,
        module: nn.Module,
        groups: Sequence[ParameterGroup],
        *,
        clip: float,
        device: torch.device,
        starts: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.module = module
        self.device = device
        self._optimizer = FlatAdamW(split_by_decay(groups), clip, starts or {})
        self.description = f"plain {str(next(module.parameters()).dtype).removeprefix('torch.')}"
        self.steps_applied = 0

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients; a non-finite loss makes all of them non-finite."""
        poisoned(loss).backward()

    def step(self, lrs: Mapping[str, float]) -> StepInfo:
        """Sum the gradients over ranks, clip, update."""
        if distributed.world_size() > 1:
            for gradient in self._optimizer.gradients:
                dist.all_reduce(gradient)
        self._optimizer.set_lrs(lrs)
        self._optimizer.step()
        self.steps_applied += self._optimizer.last.applied
        return self._optimizer.last

    @contextmanager
    def gathered(self) -> Iterator[nn.Module]:
        """Give the module; its parameters are always in place."""
        yield self.module

    def full_parameters(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield the parameters on the CPU."""
        yield from replicated_parameters(self.module, names)

    def state_out(self) -> Iterator[StateSlice]:
        """Yield this rank's share of what all hold."""
        yield from replicated_state(self._optimizer)

    def state_in(self, read: ReadState, *, steps_applied: int) -> None:
        """Read everything on every rank."""
        load_replicated_state(self._optimizer, read, steps_applied)
        self.steps_applied = steps_applied

    def close(self) -> None:
        """Nothing to let go of."""


def poisoned(loss: Tensor) -> Tensor:
    """Return the loss unchanged if it is finite, else one whose every gradient is NaN."""
    return loss * (1.0 + 0.0 * loss.detach())


def replicated_parameters(module: nn.Module, names: Iterable[str] | None) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters that this rank holds whole."""
    wanted = None if names is None else set(names)
    for name, parameter in module.named_parameters():
        if wanted is None or name in wanted:
            yield name, parameter.detach().cpu()


def replicated_state(optimizer: FlatAdamW) -> Iterator[StateSlice]:
    """Deal a replicated optimiser's elements out to the ranks: to each one run of every group, all of one length."""
    rank, size = distributed.rank(), distributed.world_size()
    for group in STATE_GROUPS:
        tensors = list(optimizer.slices(group))
        total = sum(values.numel() for _, _, values in tensors)
        first, last = total * rank // size, total * (rank + 1) // size
        offset = 0
        for name, shape, values in tensors:
            start, stop = max(0, first - offset), min(values.numel(), last - offset)
            if start < stop or (values.numel() == 0 and rank == 0):  # what has no elements is an item, too
                yield StateSlice(group, name, tuple(shape), start, values[start:stop].detach())
            offset += values.numel()


@torch.no_grad()
def load_replicated_state(optimizer: FlatAdamW, read: ReadState, steps_applied: int) -> None:
    """Fill a replicated optimiser, and the working parameters with it."""
    for group in STATE_GROUPS:
        for name, _, values in optimizer.slices(group):
            values.copy_(read(group, name, 0, values.numel()))
    optimizer.set_step_count(steps_applied)
    optimizer.refresh_working_copies()
