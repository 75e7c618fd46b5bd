"""Drivers that connect to a cluster which exists already; each prints one JSON line, or waits to be killed."""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray

from cluster import ray_group
from cluster.each_node import ask_each_node
from cluster.protocol import WorkerFailed, WorkerSpec
from cluster.ray_group import RayGroup
from cluster.session import Session, start
from recipes.errors import CapacityError
from trainers.store.store import Store

HERE = str(Path(__file__).resolve().parent)


def spec(logs: Path, **fields: Any) -> WorkerSpec:
    """Three workers of one CPU."""
    defaults: dict[str, Any] = {
        "name": "learners",
        "num_workers": 3,
        "preload": None,
        "environment": {"PYTHONPATH": HERE},
    }
    return WorkerSpec(log_folder=logs, **{**defaults, **fields})


def spread(session: Session, logs: Path) -> dict[str, Any]:
    """A group over all nodes, a verifier beside it, everything given back."""
    others = (
        ray.remote(num_cpus=0)(Bystander).options(name="bystander", lifetime="detached", namespace="other").remote()
    )
    ray.get(others.ping.remote())
    with (
        RayGroup(session, spec(logs)) as group,
        RayGroup(session, spec(logs, name="verifier", num_workers=1, cpus_per_worker=0, reusable=True)) as verifier,
    ):
        results = group.run("cluster_targets:echo", {})
        sums = group.run("cluster_targets:all_reduce", {})
        checked = verifier.run("cluster_targets:echo", {})
        nodes = {rank.node_id for rank in group._ranks}  # type: ignore[attr-defined]
        try:
            group._start_in({0: "f" * 56})
        except CapacityError as error:  # as of a node that Ray has given up a moment ago
            gone = str(error)
    deadline = time.monotonic() + 10
    while sum(node.free_cpus for node in session.nodes()) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    return {
        "nodes": len(nodes),
        "gone": gone,
        "results": results,
        "sums": sums,
        "checked": checked,
        "free": sum(node.free_cpus for node in session.nodes()),
        "bystander": ray.get(others.ping.remote()),
    }


class Bystander:
    """Somebody else's actor."""

    def ping(self) -> str:
        """Answers."""
        return "alive"


def shipped_logs(session: Session, logs: Path) -> dict[str, Any]:
    """Workers that do not see this machine's files: their output comes through Ray, that of a dead rank too."""
    ray_group.this_machine = lambda: "another machine"
    before = set(Path(tempfile.gettempdir()).glob("trainwright-logs-*"))
    with RayGroup(session, spec(logs)) as group:
        group.run("cluster_targets:echo", {}, label="whole")
        try:
            group.run("cluster_targets:fail_on", {"rank": 1, "how": 9, "others_after_s": 0.0}, label="dead")
        except WorkerFailed as failure:
            verdict = failure.verdict
    return {
        "logs": {path.name: path.read_text() for path in sorted(logs.glob("*.log"))},
        "message": verdict.message,
        "tail": verdict.tail,
        "litter": [str(path) for path in set(Path(tempfile.gettempdir()).glob("trainwright-logs-*")) - before],
    }


def unmounted(session: Session, logs: Path) -> dict[str, Any]:
    """A stage of three ranks on three nodes, of which one does not see the run in the store."""
    run = Store.open(str(logs / "store")).new_run("small")
    (logs / "mount point").mkdir()
    with RayGroup(session, spec(logs)) as group:
        try:
            group.run("cluster_targets:stage_where_unmounted", {"store": str(logs / "mount point"), "run": run.id})
        except WorkerFailed as failure:
            return failure.verdict.to_json()
    raise AssertionError("it ended")


def asked(session: Session, logs: Path) -> dict[str, Any]:
    """One question to every node, and one that no node can answer."""
    nodes = session.nodes()
    return {
        "answers": ask_each_node(nodes, "operator:neg", 5, 60.0),
        "failures": ask_each_node(nodes, "operator:neg", {}, 60.0),
        "late": ask_each_node(nodes, "time:sleep", 20, 0.5),
    }


def too_large(session: Session, logs: Path) -> dict[str, Any]:
    """More than there is."""
    started = time.monotonic()
    try:
        RayGroup(session, spec(logs, num_workers=8))
    except CapacityError as error:
        return {"message": str(error), "seconds": time.monotonic() - started}
    raise AssertionError("it was placed")


def wait(session: Session, logs: Path) -> dict[str, Any]:
    """Holds everything until it is killed, or loses a node."""
    with RayGroup(session, spec(logs)) as group:
        try:
            group.run(
                "cluster_targets:beat_often",
                {"steps": 10**6},
                lambda rank, phase, progress: print(json.dumps({"working": rank}), flush=True),
            )
        except WorkerFailed as failure:
            return failure.verdict.to_json()
    raise AssertionError("it ended")


def free(session: Session, logs: Path) -> dict[str, Any]:
    """What is free within twenty seconds."""
    deadline = time.monotonic() + 20
    while sum(node.free_cpus for node in session.nodes()) < 3 and time.monotonic() < deadline:
        time.sleep(0.2)
    return {"free": sum(node.free_cpus for node in session.nodes()), "waited_s": 20 - (deadline - time.monotonic())}


SCENARIOS = {
    "spread": spread, "shipped_logs": shipped_logs, "unmounted": unmounted, "too_large": too_large, "wait": wait,
    "asked": asked,
    "free": free,
}  # fmt: skip

if __name__ == "__main__":
    with start(sys.argv[2], name="test") as session:
        print(json.dumps(SCENARIOS[sys.argv[1]](session, Path(sys.argv[3]))), flush=True)
