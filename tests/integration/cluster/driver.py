"""A driver that is killed from outside: starts an embedded Ray and a group, says where it is, and waits."""

import json
import sys
import threading
import time
from pathlib import Path

import psutil

from cluster.protocol import WorkerFailed, WorkerGroup, WorkerSpec
from cluster.ray_group import RayGroup
from cluster.session import start


def say(**what: object) -> None:
    """One line for the test."""
    print(json.dumps(what), flush=True)


def lose_service(group: WorkerGroup, name: str) -> None:
    """Kills a part of Ray itself while a run works."""
    (service,) = [child for child in psutil.Process().children() if child.name() == name]
    threading.Timer(1.0, service.kill).start()
    started = time.monotonic()
    try:
        group.run("cluster_targets:ignore_stop", {})
    except WorkerFailed as failure:
        say(at="failed", message=str(failure), seconds=time.monotonic() - started)


def main(moment: str, logs: Path) -> None:
    """Goes as far as the moment asks."""
    say(at="begin")
    session = start(log_folder=logs)
    say(at="session", folder=str(session.folder))
    here = str(Path(__file__).resolve().parent)
    spec = WorkerSpec(name="learners", num_workers=2, log_folder=logs, environment={"PYTHONPATH": here}, preload="wave")
    group = RayGroup(session, spec)
    group.prepare()
    say(at="group")
    if moment == "imports":
        time.sleep(600)
    if moment == "normal":
        group.run("cluster_targets:echo", {})
        session.shutdown()
        say(at="end")
        return
    if moment == "exception":
        group.run("cluster_targets:echo", {})
        raise RuntimeError("a driver's own mistake")
    if moment in ("raylet", "gcs_server"):
        lose_service(group, moment)
        session.shutdown()
        say(at="end")
        return
    group.run("cluster_targets:leave_litter", {}, lambda rank, phase, progress: say(at=phase, rank=rank, **progress))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
