"""`doctor`: what this machine and, with an address, the cluster has and lacks."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from recipes.errors import CapacityError, TrainwrightError
from recipes.stages.rollout_engines import vllm_folder, vllm_version


@dataclass(frozen=True)
class Finding:
    """One line of `doctor`."""

    name: str
    ok: bool
    detail: str

    def to_json(self) -> dict[str, Any]:
        """The stable JSON form."""
        return asdict(self)


def examine(*, store: str | None = None, address: str | None = None, calibrates: bool = False) -> list[Finding]:
    """What this machine and, with an address, the cluster has and lacks; with `calibrates` this machine is measured."""
    from launch.capacity.nodes import examine_nodes, nodes_of
    from trainers.store.store import Store

    findings = [_versions(), _vllm(), _processors(), _shared_memory(), _calibration(calibrates=calibrates)]
    try:
        opened = Store.open(store)
        started = time.monotonic()
        opened.probe_writable()
        took = time.monotonic() - started
        free = opened.free_bytes()
        space = "" if free is None else f", {free / 2**30:.1f} GiB free"
        findings.append(Finding("store", True, f"{opened.uri} is writable ({took * 1000:.0f} ms a commit){space}"))
    except TrainwrightError as error:
        findings.append(Finding("store", False, str(error)))
    if address is not None:
        try:
            nodes = nodes_of(address)
            total = f"{sum(node.cpus for node in nodes):g} CPU, {sum(node.gpus for node in nodes):g} GPU"
            findings.append(Finding("cluster", True, f"{address}: {len(nodes)} nodes, {total}"))
            if not address.startswith("http"):
                shared = None if store is None or "://" in store else store
                findings += per_node(examine_nodes(address, shared))
        except TrainwrightError as error:
            findings.append(Finding("cluster", False, str(error)))
    return findings


def per_node(found: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """One line per node: what is not well there with what to do, or what was looked at."""
    nodes: dict[str, list[Mapping[str, Any]]] = {}
    for item in found:
        nodes.setdefault(item["node"], []).append(item)
    lines = []
    for node, items in nodes.items():
        bad = [f"{item['check']}: {item['detail']}; {item['advice']}" for item in items if not item["is_well"]]
        looked_at = dict.fromkeys(item["check"] for item in items)
        lines.append(Finding(f"node {node}", not bad, ". ".join(bad) or f"well: {', '.join(looked_at)}"))
    return lines


def _versions() -> Finding:
    from importlib.metadata import PackageNotFoundError, version

    found, missing = [], []
    for name in ("trainwright", "torch", "deepspeed", "ray", "transformers", "peft"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    detail = ", ".join(found) + (f"; missing: {', '.join(missing)}" if missing else "")
    return Finding("packages", not missing, detail)


def _vllm() -> Finding:
    """The environment of `rollout.engine: {name: vllm}`."""
    version, folder = vllm_version(), vllm_folder()
    return Finding(
        "vllm", True, f"none in {folder}: `make setup-vllm`" if version is None else f"{version} in {folder}"
    )


def _processors() -> Finding:
    from launch.capacity.nodes import nodes_of

    node = nodes_of(None)[0]
    said = [f"{node.cpus:g} CPU" + (f" ({node.cpu_bf16})" if node.cpu_bf16 else ""), f"{node.gpus:g} GPU"]
    if node.gpu_capability is not None:
        said[1] += f" (compute capability {node.gpu_capability / 10:.1f}, {node.gpu_memory_bytes / 2**30:.1f} GiB)"
    return Finding("machine", True, f"{', '.join(said)}, {node.memory_bytes / 2**30:.1f} GiB memory")


def _calibration(*, calibrates: bool) -> Finding:
    """What plans of this machine compute times from."""
    from launch.capacity.calibration import calibrate, calibrated_rates, calibration_file
    from launch.capacity.nodes import nodes_of

    node = nodes_of(None)[0]
    try:
        if calibrates:
            calibrate(node)
    except CapacityError as error:
        return Finding("calibration", False, str(error))
    rates = calibrated_rates(node)
    if rates is None:
        return Finding("calibration", True, "none of this machine: `trainwright doctor --calibrate` measures it")
    return Finding("calibration", True, f"{rates.source}; kept in {calibration_file()}")


def _shared_memory() -> Finding:
    found = os.statvfs("/dev/shm")
    free = found.f_bavail * found.f_frsize
    return Finding("/dev/shm", free >= 128 << 20, f"{free / 2**20:,.0f} MiB free")
