"""What a machine was measured to get done, kept in the user's cache folder for the plans of this machine."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cluster.rank_process import rank_environment
from cluster.topology import Node
from recipes.errors import CapacityError
from recipes.planning.cost import Rates
from recipes.planning.settle import PROCESS_BYTES

FORMAT = 1
TIMEOUT_S = 900.0


def calibration_file() -> Path:
    """Where calibrations are kept."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "trainwright" / "calibration.json"


def calibrate(node: Node) -> dict[str, Any]:
    """Measure this machine as one worker sees it and keep what was found; raises CapacityError."""
    on_gpu = node.gpus > 0
    threads = max(1, int(node.cpus)) if on_gpu else 1
    asked = subprocess.run(
        [sys.executable, "-m", "trainers.training.calibration", "cuda" if on_gpu else "cpu"],
        env=rank_environment(os.environ, {}, threads, on_gpu),
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )
    if asked.returncode:
        raise CapacityError(f"this machine cannot be measured: {asked.stderr.strip().splitlines()[-1]}")
    record = {
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine_of(node),
        "rates": json.loads(asked.stdout.splitlines()[-1]),
    }
    others = [other for other in _records() if other["machine"] != record["machine"]]
    path = calibration_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(".new")
    written.write_text(json.dumps({"format": FORMAT, "machines": [*others, record]}, indent=1))
    written.replace(path)
    return record


def machine_of(node: Node) -> dict[str, Any]:
    """What tells this machine from others whose rates differ."""
    found: dict[str, Any] = {"host": platform.node(), "processor": _processor(), "cpus": node.cpus}
    if node.gpus:
        found |= {"gpu_capability": node.gpu_capability, "gpu_memory_bytes": node.gpu_memory_bytes}
    return found


def calibrated_rates(node: Node) -> Rates | None:
    """The rates of a worker on this machine; None: it was not measured."""
    record = _record_of(node)
    if record is None:
        return None
    source = f"measured on {record['machine']['host']} at {record['measured_at']}: {summary(record)}"
    return rates_of(record["rates"], source)


def process_bytes_of(nodes: Sequence[Node]) -> int:
    """What a worker's process takes before it holds a model: as measured, where the nodes are this machine alone."""
    record = _record_of(nodes[0]) if len(nodes) == 1 else None
    found = None if record is None else record["rates"].get("process_bytes")
    return PROCESS_BYTES if found is None else int(found)


def rates_of(rates: dict[str, Any], source: str) -> Rates:
    """The rates that `trainers.training.calibration` measured."""
    by_width = {
        what: {
            precision: sorted((int(width), rate) for width, rate in found.items())
            for precision, found in rates[what].items()
        }
        for what in ("training", "adapters")
    }
    return Rates(
        flops_per_s=by_width["training"],
        adapter_flops_per_s=by_width["adapters"],
        bytes_per_s=rates["bytes_per_s"],
        source=source,
        image_flops_per_s=rates["convolutions"],
        writing_flops_per_s=rates["writing"],
        layer_s=rates["layer_s"],
    )


def summary(record: dict[str, Any]) -> str:
    """A calibration in a line."""
    rates = record["rates"]
    said = []
    for precision, training in rates["training"].items():
        reached = [rate / 1e9 for rate in training.values()]
        product = rates["products"][precision] / 1e9
        said.append(f"{precision} {min(reached):,.0f} to {max(reached):,.0f} GFLOP/s in training ({product:,.0f} peak)")
    taken = rates.get("process_bytes")
    process = "" if taken is None else f", {taken / 2**20:,.0f} MiB a process"
    return f"{', '.join(said)}, {rates['bytes_per_s'] / 1e9:,.1f} GB/s{process}"


def _record_of(node: Node) -> dict[str, Any] | None:
    return next((record for record in _records() if record["machine"] == machine_of(node)), None)


def _records() -> list[dict[str, Any]]:
    """Calibrations of every machine that shares the cache folder; none where the file is of another format."""
    try:
        value = json.loads(calibration_file().read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return []
    return list(value["machines"]) if isinstance(value, dict) and value.get("format") == FORMAT else []


def _processor() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.machine()
