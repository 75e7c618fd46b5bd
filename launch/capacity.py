"""How many workers a recipe gets: what it asks for against what the machine or the cluster has."""

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.topology import Node, Refusal, Request, fit
from recipes.errors import CapacityError
from recipes.plan import Plan, fit_workers
from recipes.recipe import Recipe

AUTO_CPU_WORKERS = 2
PROCESS_BYTES = 500 << 20
"""What a worker's libraries take before it holds a model."""


@dataclass(frozen=True)
class Workers:
    """Workers per stage and the GPUs of each."""

    num_workers: int
    gpus_per_worker: int


def settle_workers(recipe: Recipe, nodes: Sequence[Node]) -> Workers:
    """Resolve `auto` on these nodes; raises CapacityError that says what was asked and what is there."""
    cluster = recipe.cluster
    num_gpus = int(sum(node.gpus for node in nodes))
    num_cpus = int(sum(node.cpus for node in nodes))
    gpus = (1 if num_gpus else 0) if cluster.gpus_per_worker == "auto" else cluster.gpus_per_worker
    if cluster.workers == "auto":
        available = num_gpus if gpus else min(AUTO_CPU_WORKERS, num_cpus)
        workers = fit_workers(recipe, max(1, available))
        if workers < cluster.min_workers:
            kind = "GPU" if gpus else "CPU"
            raise CapacityError(
                f"cluster.min_workers is {cluster.min_workers}; at most {workers} can be had: there is room for "
                f"{available} {kind} worker{'' if available == 1 else 's'}, and their number must divide every batch"
            )
    else:
        workers = cluster.workers
    found = fit(Request(workers, 1.0, gpus), nodes)
    if isinstance(found, Refusal):
        raise CapacityError(found.reason)
    return Workers(workers, gpus)


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
