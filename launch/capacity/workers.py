"""How many workers a recipe gets: what it asks for against what the machine or the cluster has."""

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.topology import Node, Refusal, Request, fit
from launch.capacity.calibration import calibrated_rates, process_bytes_of
from recipes.errors import CapacityError
from recipes.planning.cost import Rates, stated_rates
from recipes.planning.gpus import GPUS_PER_NODE, Gpus, nearest_gpu
from recipes.planning.plan import fit_workers
from recipes.planning.settle import Hardware
from recipes.recipe import Recipe

AUTO_CPU_WORKERS = 2
LEAST_CAPABILITY = 80
"""Of GPUs with tensor cores for bf16 and TF32: Ampere, compute capability 8.0."""
FAST_BF16_FLAGS = ("amx_bf16",)
"""Instructions of CPUs that were measured to be faster in bf16."""


@dataclass(frozen=True)
class Workers:
    """Workers per stage and the GPUs of each."""

    num_workers: int
    gpus_per_worker: int


def settle_workers(recipe: Recipe, nodes: Sequence[Node]) -> Workers:
    """Resolve `auto` on these nodes; raises CapacityError naming what was asked for and what there is."""
    cluster = recipe.cluster
    num_gpus = int(sum(node.gpus for node in nodes))
    num_cpus = int(sum(node.cpus for node in nodes))
    gpus = (1 if num_gpus else 0) if cluster.gpus_per_worker == "auto" else cluster.gpus_per_worker
    if cluster.workers == "auto":
        available = num_gpus if gpus else min(AUTO_CPU_WORKERS, num_cpus)
        workers = fit_workers(recipe, max(1, available))
        if workers < (cluster.min_workers or 1):
            kind = "GPU" if gpus else "CPU"
            raise CapacityError(
                f"cluster.min_workers is {cluster.min_workers}; at most {workers} can be placed: there is room for "
                f"{available} {kind} worker{'' if available == 1 else 's'}, and their number must divide every batch"
            )
    else:
        workers = cluster.workers
    found = fit(Request(workers, 1.0, gpus), nodes)
    if isinstance(found, Refusal):
        raise CapacityError(found.reason)
    return Workers(workers, gpus)


def imagined_nodes(gpus: Gpus) -> list[Node]:
    """Nodes with GPUs that one does not have, eight in each; of their processors and memory nothing is known."""
    nodes = []
    for number, first in enumerate(range(0, gpus.count, GPUS_PER_NODE)):
        count = float(min(GPUS_PER_NODE, gpus.count - first))
        cpus, capability, memory = 16 * count, gpus.gpu.capability, gpus.gpu.memory_bytes
        nodes.append(Node(f"{number}", f"node {number}", cpus, count, 0, cpus, count, "", capability, memory))
    return nodes


def find_rates(
    nodes: Sequence[Node], workers: Workers, utilisation: float, *, is_here: bool, gpus: Gpus | None
) -> Rates | None:
    """What a worker gets done: as it was measured where the node `is_here`, this machine; else by the data sheet of
    these GPUs, or of the one that is most like those that are there. None: not known.
    """
    if gpus is not None and workers.gpus_per_worker:
        return stated_rates(gpus.gpu, utilisation)
    here = calibrated_rates(nodes[0]) if is_here else None
    if here is not None or not workers.gpus_per_worker:
        return here
    known = [node for node in nodes if node.gpus and node.gpu_capability is not None and node.gpu_memory_bytes]
    if not known:
        return None
    least = min(known, key=lambda node: (node.gpu_capability or 0, node.gpu_memory_bytes))
    return stated_rates(nearest_gpu(least.gpu_memory_bytes, least.gpu_capability or 0), utilisation)


def hardware_of(nodes: Sequence[Node], workers: Workers) -> Hardware:
    """What `auto` is settled by: what all nodes that may take a worker have in common."""
    is_gpu = workers.gpus_per_worker > 0
    usable = [node for node in nodes if (node.gpus if is_gpu else node.cpus) > 0]
    lacking = [f"{node.address}: {said}" for node in usable if (said := _lacks_bf16(node, is_gpu))]
    fast = ""
    if usable and not lacking:
        flags = [str(node.cpu_bf16) for node in usable]
        least = min(node.gpu_capability or 0 for node in usable)
        fast = f"compute capability {least / 10:.1f}" if is_gpu else min(flags)
    room = [node.gpu_memory_bytes for node in usable] if is_gpu else _shares_of_memory(nodes, workers)
    room_bytes = min(room) if room and min(room) > 0 else None
    return Hardware(is_gpu, fast, lacking[0] if lacking else "", room_bytes, process_bytes_of(nodes))


def _lacks_bf16(node: Node, is_gpu: bool) -> str:
    """Empty, or why a node is not known to be fast in bf16."""
    if is_gpu:
        if node.gpu_capability is None:
            return "its GPUs' compute capability is not known"
        capability = node.gpu_capability
        return "" if capability >= LEAST_CAPABILITY else f"compute capability {capability / 10:.1f} is below 8.0"
    if node.cpu_bf16 is None:
        return "its CPU's instructions are not known"
    return "" if node.cpu_bf16 in FAST_BF16_FLAGS else f"its CPU has no {' or '.join(FAST_BF16_FLAGS)}"


def _shares_of_memory(nodes: Sequence[Node], workers: Workers) -> list[int]:
    """Bytes that each worker has of its node's memory where the workers are placed; 0: not known."""
    found = fit(Request(workers.num_workers, 1.0, 0), nodes)
    return [] if isinstance(found, Refusal) else [s.node.memory_bytes // s.num_workers for s in found.shares]
