"""Where workers can go: pure comparison of a request with what every node has, and the reason when it cannot be."""

import json
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Node:
    """One machine of the cluster: what it has and what is free at this moment."""

    id: str
    address: str
    cpus: float
    gpus: float
    memory_bytes: int
    free_cpus: float
    free_gpus: float
    cpu_bf16: str | None = None
    """Instructions by which its CPU multiplies bf16; empty: none; None: not asked."""
    gpu_capability: int | None = None
    """Compute capability of its least GPU, 10 x major + minor; None: not asked, or no GPU."""
    gpu_memory_bytes: int = 0
    """Of its least GPU; 0: not known."""


@dataclass(frozen=True, slots=True)
class Request:
    """What a group needs; every worker's share has to stand on one node."""

    num_workers: int
    cpus_per_worker: float
    gpus_per_worker: int
    same_node: bool = False


@dataclass(frozen=True, slots=True)
class Share:
    """Workers that go to one node."""

    node: Node
    num_workers: int


@dataclass(frozen=True, slots=True)
class Placement:
    """Shares in rank order: ranks of one node are contiguous, the roomiest node first."""

    shares: tuple[Share, ...]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request cannot be placed, in one line that says what was asked and what is there."""

    reason: str


def fit(request: Request, nodes: Sequence[Node], *, free: bool = False) -> Placement | Refusal:
    """Places a request on the nodes' totals, or on what is free; on as few nodes as possible."""
    rooms = sorted(((_room(request, node, free), node) for node in nodes), key=lambda pair: (-pair[0], pair[1].id))
    largest = rooms[0][0] if rooms else 0
    if request.same_node:
        # The tightest node that takes all leaves the roomier ones to others.
        enough = [pair for pair in rooms if pair[0] >= request.num_workers]
        if enough:
            return Placement((Share(enough[-1][1], request.num_workers),))
        return Refusal(f"needs {_asked(request)} on one node; {_largest(request, nodes, free)}")
    left = request.num_workers
    shares: list[Share] = []
    for room, node in rooms:
        tight = [pair for pair in rooms if pair[0] >= left and all(pair[1] is not share.node for share in shares)]
        if tight:
            shares.append(Share(tight[-1][1], left))
            return Placement(tuple(shares))
        if room:
            shares.append(Share(node, room))
            left -= room
    if largest == 0 and nodes:
        one = Request(1, request.cpus_per_worker, request.gpus_per_worker)
        return Refusal(f"needs {_asked(one)} on one node for each worker; {_largest(request, nodes, free)}")
    return Refusal(f"needs {_asked(request)}; {_everything(request, nodes, free)}")


def largest_group(request: Request, nodes: Sequence[Node], *, free: bool = False) -> int:
    """How many such workers the nodes can take by their totals, or by what is free."""
    rooms = [_room(request, node, free) for node in nodes]
    return max(rooms, default=0) if request.same_node else sum(rooms)


def _room(request: Request, node: Node, free: bool) -> int:
    cpus, gpus = (node.free_cpus, node.free_gpus) if free else (node.cpus, node.gpus)
    rooms = []
    if request.cpus_per_worker:
        rooms.append(int((cpus + 1e-6) / request.cpus_per_worker))
    if request.gpus_per_worker:
        rooms.append(int((gpus + 1e-6) / request.gpus_per_worker))
    return max(0, min(rooms, default=request.num_workers))


def _asked(request: Request) -> str:
    workers = f"{request.num_workers} worker{'s' if request.num_workers != 1 else ''}"
    parts = []
    if request.gpus_per_worker:
        parts.append(f"{request.num_workers * request.gpus_per_worker} GPU")
    if request.cpus_per_worker:
        parts.append(f"{request.num_workers * request.cpus_per_worker:g} CPU")
    return f"{' and '.join(parts)} ({workers})" if parts else workers


def _largest(request: Request, nodes: Sequence[Node], free: bool) -> str:
    if not nodes:
        return "the cluster has no nodes"
    best = max(nodes, key=lambda node: (_room(request, node, free), node.gpus, node.cpus))
    return f"the largest of {_nodes(nodes)} has {_amount(request, [best], free)}"


def _everything(request: Request, nodes: Sequence[Node], free: bool) -> str:
    if not nodes:
        return "the cluster has no nodes"
    return f"the cluster has {_amount(request, nodes, free)} on {_nodes(nodes)}"


def _amount(request: Request, nodes: Sequence[Node], free: bool) -> str:
    cpus = sum(node.free_cpus if free else node.cpus for node in nodes)
    gpus = sum(node.free_gpus if free else node.gpus for node in nodes)
    word = " free" if free else ""
    return f"{gpus:g} GPU{word} and {cpus:g} CPU{word}" if request.gpus_per_worker else f"{cpus:g} CPU{word}"


def _nodes(nodes: Sequence[Node]) -> str:
    return f"{len(nodes)} node{'s' if len(nodes) != 1 else ''}"


def read_nodes(text: str) -> list[Node]:
    """The nodes of a JSON list."""
    return [Node(**node) for node in json.loads(text)]
