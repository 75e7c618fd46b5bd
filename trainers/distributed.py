"""The process group: torchrun's environment in, few small collectives out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process's place in its worker group."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device


def join() -> Ranks:
    """Join the process group that torchrun's variables describe (none for one process without them)."""
    raise NotImplementedError


def leave() -> None:
    """Leave the process group, if any."""
    raise NotImplementedError


def rank() -> int:
    """Return this process's rank; 0 without a group."""
    raise NotImplementedError


def world_size() -> int:
    """Return the number of processes; 1 without a group."""
    raise NotImplementedError


def all_sum(values: Sequence[float]) -> list[float]:
    """Sum each value over all ranks in fp64, in rank order; one collective."""
    raise NotImplementedError


def broadcast_tensor(tensor: Tensor, source: int = 0) -> Tensor:
    """Return `source`'s tensor on every rank, in place."""
    raise NotImplementedError


def broadcast_json(value: Any, source: int = 0) -> Any:
    """Return `source`'s JSON-able value on every rank."""
    raise NotImplementedError


def gather_json(value: Any) -> list[Any]:
    """Return every rank's JSON-able value, in rank order, on every rank."""
    raise NotImplementedError


def barrier() -> None:
    """Wait for all ranks."""
    raise NotImplementedError
