"""Whether what a run needs fits: workers' memory, the store's disk."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cluster.topology import Node
from launch.capacity.workers import Workers
from recipes.errors import CapacityError
from recipes.planning.memory import KEPT_STATES
from recipes.planning.plan import Plan
from recipes.planning.settle import PROCESS_BYTES

if TYPE_CHECKING:
    from trainers.store.store import Store

SPARE_BYTES = 64 << 20
"""Room for data sets, journal, metrics and logs besides what the stages commit."""


def check_memory(plan: Plan, workers: Workers, nodes: Sequence[Node]) -> None:
    """Compare the predicted memory of CPU workers with that of the nodes; raises CapacityError naming the stage.

    A GPU's own memory is not known before a worker is there, and of some nodes none is (0).
    """
    if workers.gpus_per_worker or any(node.memory_bytes <= 0 for node in nodes):
        return
    for stage in plan.stages:
        if stage.cached or stage.sizes is None:
            continue
        each = stage.sizes.cpu_worker_bytes + PROCESS_BYTES
        room = sum(min(int(node.cpus), node.memory_bytes // each) for node in nodes)
        if room < workers.num_workers:
            largest = max(node.memory_bytes for node in nodes)
            raise CapacityError(
                f"stage {stage.name} takes about {each / 2**30:.1f} GiB of memory in each of {workers.num_workers} "
                f"workers; the nodes' memory (at most {largest / 2**30:.1f} GiB on one) is enough for {room}; "
                "take a smaller micro_batch, sequence_length or model, another ZeRO stage, or other nodes"
            )


def check_disk(plan: Plan, store: "Store") -> None:
    """Compare what the plan's stages commit with the store's free space; raises CapacityError."""
    free = store.free_bytes()
    waiting = [stage.sizes for stage in plan.stages if not stage.cached and stage.sizes is not None]
    if free is None or not waiting:
        return
    # Of each stage the newest states stay, until a collection is asked to drop them; one more is being written.
    artifacts = sum(sizes.artifact_bytes for sizes in waiting)
    states = sum(KEPT_STATES * sizes.state_bytes for sizes in waiting)
    states += max(sizes.state_bytes for sizes in waiting)
    needed = artifacts + states + SPARE_BYTES
    if needed > free:
        raise CapacityError(
            f"store {store.uri} has {free / 2**20:,.0f} MiB free; the run needs about {needed / 2**20:,.0f} MiB "
            f"({artifacts / 2**20:,.0f} MiB of artifacts, {states / 2**20:,.0f} MiB of training state, "
            f"{SPARE_BYTES >> 20} MiB for data, logs and reports)"
        )
