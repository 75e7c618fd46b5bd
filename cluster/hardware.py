"""What a node's processors multiply fast, and the memory of its GPUs: asked of the kernel and of CUDA's driver."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cluster import gpu_driver
from cluster.topology import Node
from recipes.errors import CapacityError

BF16_FLAGS = ("amx_bf16", "avx512_bf16")
"""Names in /proc/cpuinfo of the instructions that multiply bf16, the faster first."""
CPUINFO = Path("/proc/cpuinfo")
DRIVER_TIMEOUT_S = 20.0
NODE_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Processors:
    """Facts of one node, under the names that `Node` has for them."""

    cpu_bf16: str
    """Instructions by which the CPU multiplies bf16; empty: none."""
    gpu_capability: int | None
    """Compute capability of the least GPU, 10 x major + minor; None: no GPU, or no driver."""
    gpu_memory_bytes: int
    """Of the least GPU; 0: no GPU, or no driver."""


def find_processors(environment: Mapping[str, str] | None = None, num_gpus: int | None = None) -> Processors:
    """Look at this machine; `environment` says which GPUs are visible, without GPUs (0) no driver is asked."""
    gpus = [] if num_gpus == 0 else _ask_driver(os.environ if environment is None else environment)
    return Processors(
        cpu_bf16=bf16_flag(CPUINFO.read_text() if CPUINFO.exists() else ""),
        gpu_capability=min((gpu["capability"] for gpu in gpus), default=None),
        gpu_memory_bytes=min((gpu["memory_bytes"] for gpu in gpus), default=0),
    )


def bf16_flag(cpuinfo: str) -> str:
    """The fastest bf16 product that every processor of the text names; empty: none."""
    lines = [line.partition(":")[2].split() for line in cpuinfo.splitlines() if line.startswith("flags")]
    return next((flag for flag in BF16_FLAGS if lines and all(flag in line for line in lines)), "")


def with_processors(nodes: Sequence[Node]) -> list[Node]:
    """The connected cluster's nodes with the facts of each; raises CapacityError naming one that does not answer."""
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look = ray.remote(_look)
    asked = [
        look.options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote()
        for node in nodes
    ]
    found = []
    for node, answer in zip(nodes, asked, strict=True):
        try:
            found.append(replace(node, **ray.get(answer, timeout=NODE_TIMEOUT_S)))
        except RayError as error:
            first = str(error).strip().splitlines()[0]
            raise CapacityError(f"node {node.address} does not say what its processors can do: {first}") from None
    return found


def _look() -> dict[str, object]:
    """On a node: its facts. Ray hides GPUs from a task that asked for none."""
    return asdict(find_processors({key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}))


def _ask_driver(environment: Mapping[str, str]) -> list[dict[str, int]]:
    asked = subprocess.run(
        [sys.executable, "-I", "-S", gpu_driver.__file__],
        env=dict(environment),
        capture_output=True,
        text=True,
        check=False,
        timeout=DRIVER_TIMEOUT_S,
    )
    if asked.returncode:
        raise CapacityError(asked.stderr.strip().splitlines()[-1])
    found: list[dict[str, int]] = json.loads(asked.stdout)
    return found
