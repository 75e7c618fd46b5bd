"""What the loop needs of an engine: forward, backward, step, and the full state out and in.

Two implementations: `plain` (one process, the oracle of the tests) and `deepspeed` (ZeRO 0-3).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

StateGroup = Literal["param", "exp_avg", "exp_avg_sq"]
STATE_GROUPS: tuple[StateGroup, ...] = ("param", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate; matrices get the weight decay, vectors none."""

    name: str
    parameters: tuple[tuple[str, nn.Parameter], ...]
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0


@dataclass(frozen=True)
class StepInfo:
    """Outcome of one optimiser step: the norm over all ranks before clipping, and whether anything was changed."""

    grad_norm: float
    applied: bool


@dataclass(frozen=True)
class StateSlice:
    """A run of one logical fp32 tensor of the training state, in row-major order from element `start`."""

    group: StateGroup
    name: str
    shape: tuple[int, ...]
    start: int
    values: Tensor


ReadState = Callable[[StateGroup, str, int, int], Tensor]
"""Give elements [start, stop) of a logical tensor as a flat fp32 CPU tensor: (group, name, start, stop)."""


class StatefulEngine(Protocol):
    """What a checkpoint needs of an engine, or of several as one."""

    @property
    def device(self) -> torch.device:
        """Where batches have to be."""

    @property
    def description(self) -> str:
        """What computes, as far as the bits of its sums depend on it: `deepspeed zero 2 bf16`."""

    @property
    def steps_applied(self) -> int:
        """Optimiser steps that changed the parameters, over all attempts."""

    def state_out(self) -> Iterator[StateSlice]:
        """Yield this rank's share of fp32 values and moments of the trainable parameters; over ranks each element once.

        No collective. The tensors are views: written or copied before the next step.
        """

    def state_in(self, read: ReadState, *, steps_applied: int) -> None:
        """Take over a state that `state_out` gave, from any engine and any number of ranks; collective."""

    def full_parameters(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield every (or the named) parameter whole, in its working precision on the CPU, on every rank; collective.

        Names are those of `module.named_parameters()`; tied parameters come once.
        """


class Engine(StatefulEngine, Protocol):
    """Owns the parameters of one module and their optimiser."""

    @property
    def module(self) -> nn.Module:
        """Call this for forwards; attributes of the wrapped module are reachable through it."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of `loss`, this rank's loss sum / global weight; over ranks they are summed."""

    def step(self, lrs: Mapping[str, float]) -> StepInfo:
        """Clip, update and clear the gradients; `lrs` by the names of the parameter groups; collective.

        A non-finite loss or gradient norm on any rank makes no rank change anything but its gradients.
        """

    def gathered(self) -> AbstractContextManager[nn.Module]:
        """Give the bare module with every parameter in place: inside, forwards run no collective (generation).

        Entered and left by all ranks; parameters are read, not written.
        """

    def close(self) -> None:
        """Let go of hooks and buffers; the engine is not used afterwards."""
