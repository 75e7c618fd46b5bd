"""Is this cluster fit for training? One probe per node says what it has and whom it reaches; pure comparison judges.

python -m cluster.doctor [--address HOST:PORT] [--shared FOLDER]
"""

import argparse
import contextlib
import os
import resource
import secrets
import shutil
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.each_node import answer_of
from cluster.protocol import Json
from cluster.session import Session, count_cpus, count_gpus, start
from cluster.topology import Node
from cluster.worker import installed_versions, interface_of
from recipes.errors import CapacityError
from recipes.stages.rollout_engines import vllm_version

CLOCK_TOLERANCE_S = 1.0
LEAST_SHM_BYTES = 256 * 2**20
LEAST_TEMPORARY_BYTES = 2 * 2**30
LEAST_OPEN_FILES = 1024
CALL_TIMEOUT_S = 30.0
K = TypeVar("K")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at; advice stands where it is not well."""

    check: str
    node: str
    is_well: bool
    detail: str
    advice: str = ""


class Probe:
    """One per node: looks around, listens, connects."""

    def look(self, address: str, shared_folder: str, token: str) -> Json:
        """What this node has."""
        seen = ""
        if shared_folder:
            with contextlib.suppress(OSError):
                seen = (Path(shared_folder) / f".doctor-{token}").read_text()
        return {
            "versions": {**installed_versions(), "vllm": vllm_version() or "absent"},
            "clock": time.time(),
            "shm_bytes": shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0,
            "temporary_bytes": shutil.disk_usage("/tmp").free,
            "memory_bytes": psutil.virtual_memory().available,
            "cpus": count_cpus(),
            "gpus": count_gpus(),
            "interface": interface_of(address),
            "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            "has_pidfd": hasattr(os, "pidfd_open"),
            "sees_shared": seen == token,
        }

    def listen(self) -> int:
        """Accepts connections on a port that it returns."""
        listener = socket.create_server(("", 0))

        def accept() -> None:
            while True:
                connection, _ = listener.accept()
                connection.close()

        threading.Thread(target=accept, daemon=True).start()
        port: int = listener.getsockname()[1]
        return port

    def reaches(self, address: str, port: int) -> str:
        """Empty, or why a TCP connection fails."""
        try:
            socket.create_connection((address, port), timeout=5).close()
        except OSError as error:
            return str(error)
        return ""


def examine(session: Session, shared_folder: Path | None = None) -> list[Finding]:
    """Looks at every node of a connected cluster; a shared folder has to be the same one everywhere."""
    nodes = session.nodes()
    cut_off = session.cut_off({node.id for node in nodes})
    probes = {
        node.id: ray.remote(Probe)
        .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False))
        .remote()
        for node in nodes
        if node.id not in cut_off
    }
    token = secrets.token_hex(8)
    mark = shared_folder / f".doctor-{token}" if shared_folder else None
    try:
        if mark is not None:
            mark.write_text(token)
        ports = _answers({node_id: probe.listen.remote() for node_id, probe in probes.items()})
        reports: dict[str, Json | str] = dict.fromkeys(cut_off, "takes no connection")
        skews: dict[str, float] = {}
        for node in nodes:
            if isinstance(ports.get(node.id), int):
                before = time.time()
                look = probes[node.id].look.remote(node.address, str(shared_folder or ""), token)
                reports |= _answers({node.id: look})
                report = reports[node.id]
                if not isinstance(report, str):
                    skews[node.id] = _skew(report["clock"], before, time.time())
            elif node.id in ports:
                reports[node.id] = ports[node.id]
        present = [node for node in nodes if not isinstance(reports[node.id], str)]
        trouble = _answers(
            {
                (one.id, other.id): probes[one.id].reaches.remote(other.address, ports[other.id])
                for one in present
                for other in present
                if one.id != other.id
            }
        )
    finally:
        if mark is not None:
            mark.unlink(missing_ok=True)
        for probe in probes.values():
            ray.kill(probe)
    return judge_nodes(nodes, reports, skews, trouble, shared_folder is not None)


def _answers(calls: Mapping[K, Any]) -> dict[K, Any]:
    """What the probes say, or in words why one says nothing."""
    if calls:
        ray.wait(list(calls.values()), num_returns=len(calls), timeout=CALL_TIMEOUT_S)
    return {key: answer_of(call, CALL_TIMEOUT_S) for key, call in calls.items()}


def judge_nodes(
    nodes: Sequence[Node],
    reports: Mapping[str, Json | str],
    skews_s: Mapping[str, float],
    trouble: Mapping[tuple[str, str], str],
    has_shared_folder: bool,
) -> list[Finding]:
    """What the reports mean, pure; a text says why there is none. The first node is the measure for versions."""
    found: list[Finding] = []
    address = {node.id: node.address for node in nodes}
    present = {node.id: report for node in nodes if not isinstance(report := reports[node.id], str)}
    measure, first = next(((address[node_id], report["versions"]) for node_id, report in present.items()), ("", {}))

    def note(check: str, node: Node, is_well: bool, detail: str, advice: str) -> None:
        found.append(Finding(check, node.address, is_well, detail, "" if is_well else advice))

    for node in nodes:
        if node.id not in present:
            note("answer", node, False, str(reports[node.id]), "see whether it is up, and start Ray there again")
            continue
        report = present[node.id]
        other = {name: value for name, value in report["versions"].items() if value != first[name]}
        detail = ", ".join(f"{name} {value} instead of {first[name]}" for name, value in other.items()) or "equal"
        note("versions", node, not other, detail, f"install the versions of node {measure}")
        skew = skews_s[node.id]
        note("clock", node, abs(skew) <= CLOCK_TOLERANCE_S, f"{skew:+.2f} s from this machine", "run a time service")
        note(
            "interface",
            node,
            bool(report["interface"]) or len(nodes) == 1,
            report["interface"] or "none has the node's address",
            "start Ray with --node-ip-address set to an address of this machine",
        )
        for check, key, least in (
            ("shared memory", "shm_bytes", LEAST_SHM_BYTES),
            ("temporary space", "temporary_bytes", LEAST_TEMPORARY_BYTES),
        ):
            amount = report[key]
            note(check, node, amount >= least, f"{amount / 2**30:.1f} GiB free", f"free {least / 2**30:.2g} GiB")
        note(
            "CPUs",
            node,
            node.cpus <= report["cpus"],
            f"Ray offers {node.cpus:g}, the machine has {report['cpus']}",
            "start Ray with --num-cpus set to what the machine has",
        )
        note(
            "GPUs",
            node,
            node.gpus == report["gpus"],
            f"Ray offers {node.gpus:g}, the machine has {report['gpus']}",
            "start Ray with --num-gpus, or fix the driver",
        )
        limit = report["open_files"]
        note("open files", node, limit >= LEAST_OPEN_FILES, f"limit {limit}", f"ulimit -n {LEAST_OPEN_FILES}")
        note("kernel", node, report["has_pidfd"], "pidfd_open", "Linux 5.3 or later is needed")
        if has_shared_folder:
            sees = report["sees_shared"]
            detail = "the same file seen" if sees else "what this machine writes is not seen"
            note("shared folder", node, sees, detail, "mount the same store here")
    for (source, target), reason in trouble.items():
        detail = reason or f"reaches {address[target]}"
        advice = f"open the ports between {address[source]} and {address[target]}" if reason else ""
        found.append(Finding("network", address[source], not reason, detail, advice))
    return found


def _skew(clock: float, before: float, after: float) -> float:
    """How far a clock read between two instants of ours is off, at the least."""
    return clock - before if clock < before else max(0.0, clock - after)


def main() -> int:
    """Prints the findings; 3 when one is bad or nothing answers."""
    parser = argparse.ArgumentParser(description="Is this cluster fit for training?")
    parser.add_argument("--address", help="host:port of a cluster, or auto; without it an embedded one is tried")
    parser.add_argument("--shared", type=Path, help="a folder that every node must see, as a store in a folder must be")
    choice = parser.parse_args()
    try:
        with start(choice.address, name="doctor") as session:
            findings = examine(session, choice.shared)
    except CapacityError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    for finding in findings:
        mark = "ok " if finding.is_well else "BAD"
        print(
            f"{mark} {finding.node:15} {finding.check}: {finding.detail}{'; ' * bool(finding.advice)}{finding.advice}"
        )
    return 0 if all(finding.is_well for finding in findings) else CapacityError.exit_code


if __name__ == "__main__":
    sys.exit(main())
