"""The process group: torchrun's environment in, few small collectives out."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.constants import default_pg_timeout

from trainers.runtime.rendezvous import meet, use_loopback

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process's place in its worker group."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device


def join() -> Ranks:
    """Join the process group that torchrun's variables describe; one process without them is a group of its own."""
    rank_here = int(os.environ.get("RANK", "0"))
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = _device(local_rank)
    if "MASTER_ADDR" in os.environ and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        use_loopback()
        found = meet(rank_here, size, default_pg_timeout)
        dist.init_process_group(backend, store=found.store, rank=rank_here, world_size=size)
        found.complete(lets_others_in=device.type == "cuda")  # NCCL connects again for every further group
    elif size > 1 and not dist.is_initialized():
        raise RuntimeError(f"WORLD_SIZE is {size} but MASTER_ADDR is not set")
    return Ranks(rank_here, size, local_rank, device)


def _device(local_rank: int) -> torch.device:
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def leave() -> None:
    """Leave the process group, if any."""
    _side_groups.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Return this process's rank; 0 without a group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes; 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_sum(values: Sequence[float]) -> list[float]:
    """Sum each value over all ranks in fp64; one collective, equal bits on every rank."""
    if world_size() == 1:
        return [float(value) for value in values]
    tensor = torch.tensor(list(values), dtype=torch.float64)
    dist.all_reduce(tensor)
    return [float(value) for value in tensor.tolist()]


def sum_tensor(tensor: Tensor) -> Tensor:
    """Add a tensor of every rank up, in place; equal bits on every rank."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def broadcast_tensor(tensor: Tensor, source: int = 0) -> Tensor:
    """Return `source`'s tensor on every rank, in place."""
    if world_size() > 1:
        dist.broadcast(tensor, source)
    return tensor


def broadcast_json(value: Any, source: int = 0) -> Any:
    """Return `source`'s JSON-able value on every rank."""
    if world_size() == 1:
        return value
    data = _as_tensor(json.dumps(value).encode()) if rank() == source else torch.empty(0, dtype=torch.uint8)
    length = torch.tensor([data.numel()])
    dist.broadcast(length, source)
    if rank() != source:
        data = torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(data, source)
    return json.loads(data.numpy().tobytes())


Exchange = Callable[[Any], list[Any]]
"""Gives every rank's JSON-able value, in rank order, on every rank."""

SIDE_TIMEOUT = timedelta(hours=2)
"""A rank may wait that long for room on the disk while the others wait for it."""
_side_groups: dict[Any, Any] = {}


def side_exchange() -> Exchange:
    """Return an exchange on a process group of its own, so that a thread may use it beside training; collective."""
    if world_size() == 1:
        return gather_json
    main = dist.group.WORLD
    if main not in _side_groups:
        _side_groups.clear()
        _side_groups[main] = dist.new_group(backend="gloo", timeout=SIDE_TIMEOUT)
    group = _side_groups[main]
    return lambda value: gather_json(value, group)


def gather_json(value: Any, group: Any = None) -> list[Any]:
    """Return every rank's JSON-able value, in rank order, on every rank of the group (of all ranks)."""
    if world_size() == 1:
        return [value]
    return [json.loads(part) for part in gather_bytes(json.dumps(value).encode(), group)]


def gather_bytes(data: bytes, group: Any = None) -> list[bytes]:
    """Return every rank's bytes, in rank order, on every rank of the group (of all ranks)."""
    size = world_size()
    if size == 1:
        return [data]
    own = _as_tensor(data)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(size)]
    dist.all_gather(lengths, torch.tensor([own.numel()]), group=group)
    longest = max(int(length) for length in lengths)
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: own.numel()] = own
    parts = [torch.empty(longest, dtype=torch.uint8) for _ in range(size)]
    dist.all_gather(parts, padded, group=group)
    return [part[: int(length)].numpy().tobytes() for part, length in zip(parts, lengths, strict=True)]


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        dist.barrier()


def first_rank_first(make: Callable[[], T]) -> T:
    """Make something on rank 0, then on the others, which find what it left in the store; collective."""
    made = [make()] if rank() == 0 else []
    barrier()
    return made[0] if made else make()


def _as_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
