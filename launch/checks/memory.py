"""Whether stages fit the workers' memory, and the change that would make one fit that does not."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from cluster.topology import Node
from launch.capacity.calibration import process_bytes_of
from launch.capacity.workers import Workers
from launch.inputs.resolved import Resolved
from recipes.errors import CapacityError
from recipes.planning.fitting import CONTEXT_BYTES, Change, find_change
from recipes.planning.gpus import GPUS
from recipes.planning.memory import Sizes
from recipes.planning.plan import Plan, PlannedStage

NO_CHANGE = (
    "no smaller micro_batch, ZeRO stage, recomputation, adapter or number of workers that was tried makes it fit"
)


@dataclass(frozen=True)
class Room:
    """The memory of the nodes that workers run on."""

    nodes: Sequence[Node]
    on_gpu: bool
    only_state: bool = False
    """Whether weights, gradients and optimiser alone are compared, which are exact."""

    @property
    def process_bytes(self) -> int:
        """What a worker's process takes of a node's memory before it holds a model."""
        return process_bytes_of(self.nodes)

    @property
    def is_known(self) -> bool:
        """Whether every node tells its memory."""
        return all(memory > 0 for memory in self._memories)

    @property
    def largest(self) -> int:
        """Memory that a worker can have at most."""
        return max(self._memories, default=0)

    @property
    def _memories(self) -> list[int]:
        if self.on_gpu:
            return [node.gpu_memory_bytes for node in self.nodes if node.gpus]
        return [node.memory_bytes for node in self.nodes]

    def needed(self, sizes: Sizes) -> int:
        """What a worker takes of it."""
        if not self.on_gpu:
            return sizes.cpu_worker_bytes + self.process_bytes
        return (sizes.memory.state if self.only_state else sizes.memory.total) + CONTEXT_BYTES

    def for_workers(self, sizes: Sizes, wanted: int) -> int:
        """How many of so many workers there is room for; GPUs that are not there have the memory of those that are."""
        each = self.needed(sizes)
        if self.on_gpu:
            return wanted if each <= min(self._memories) else 0
        return sum(min(int(node.cpus), node.memory_bytes // each) for node in self.nodes)

    def fits(self, sizes: Sizes, workers: int) -> bool:
        """Whether so many workers have room."""
        return self.for_workers(sizes, workers) >= workers


def misfits(resolved: Resolved, plan: Plan, workers: Workers, room: Room) -> Iterator[str]:
    """What does not fit, a sentence for each stage: what it takes, what there is, and what would make it fit."""
    if not room.is_known:
        return
    unit = "GPUs" if room.on_gpu else "workers"
    for stage in plan.stages:
        if stage.cached or stage.sizes is None or room.fits(stage.sizes, workers.num_workers):
            continue
        change = find_change(
            resolved.recipe.stages[stage.name],
            workers.num_workers,
            partial(resolved.sizes_of, stage.name),
            room.fits,
        )
        needed = f"{room.needed(stage.sizes) / 2**30:.1f} GiB of {'GPU ' if room.on_gpu else ''}memory"
        enough = room.for_workers(stage.sizes, workers.num_workers)
        if change is None:
            advice = _larger_gpu(resolved, stage, workers, room)
        else:
            advice = _said(
                change, stage.name, "" if change.workers == workers.num_workers else f"{change.workers} {unit}"
            )
        yield (
            f"stage {stage.name} takes about {needed} in each of {workers.num_workers} workers; the nodes' memory "
            f"(at most {room.largest / 2**30:.1f} GiB on one) is enough for {enough}; {advice}"
        )


def _said(change: Change, name: str, place: str) -> str:
    """A change in words; `place` is what it is for, where that is not what there is."""
    return " ".join(word for word in ("it fits", place, f"with {change.text(name)}" if change.settings else "") if word)


def _larger_gpu(resolved: Resolved, stage: PlannedStage, workers: Workers, room: Room) -> str:
    """The smallest GPU of the table that it fits, with what changes."""
    for gpu in sorted(GPUS.values(), key=lambda gpu: gpu.memory_bytes) if room.on_gpu else ():
        if gpu.memory_bytes <= room.largest:
            continue
        nodes = [replace(node, gpu_memory_bytes=gpu.memory_bytes) for node in room.nodes if node.gpus]
        other = replace(room, nodes=nodes)
        planned, resize = resolved.recipe.stages[stage.name], partial(resolved.sizes_of, stage.name)
        change = find_change(planned, workers.num_workers, resize, other.fits)
        if change is not None:
            return _said(change, stage.name, f"{change.workers}x{gpu.name}")
    return NO_CHANGE


def check_memory(
    resolved: Resolved, plan: Plan, workers: Workers, nodes: Sequence[Node], *, only_state: bool = False
) -> None:
    """Raise CapacityError with every stage that does not fit; nodes of which no memory is known refuse nothing."""
    found = [*misfits(resolved, plan, workers, Room(nodes, workers.gpus_per_worker > 0, only_state))]
    if found:
        raise CapacityError("\n".join(found))
