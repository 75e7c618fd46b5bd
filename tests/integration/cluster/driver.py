"""A driver that is killed from outside: starts an embedded Ray and a group, says where it is, and waits."""

import json
import sys
import time
from pathlib import Path

from cluster.protocol import WorkerSpec
from cluster.session import start


def say(**what: object) -> None:
    """One line for the test."""
    print(json.dumps(what), flush=True)


def main(moment: str, logs: Path) -> None:
    """Goes as far as the moment asks."""
    say(at="begin")
    session = start(log_folder=logs)
    say(at="session", folder=str(session.folder))
    if moment == "session":
        time.sleep(600)
    here = str(Path(__file__).resolve().parent)
    spec = WorkerSpec(name="learners", num_workers=2, log_folder=logs, environment={"PYTHONPATH": here}, preload="wave")
    group = session.group(spec)
    group.prepare_next()
    say(at="group")
    if moment == "spares":
        time.sleep(600)
    if moment == "normal":
        group.run("cluster_targets:echo", {})
        session.shutdown()
        say(at="end")
        return
    if moment == "exception":
        group.run("cluster_targets:echo", {}, spares=True)
        raise RuntimeError("a driver's own mistake")
    group.run("cluster_targets:leave_litter", {}, lambda rank, phase, progress: say(at=phase, rank=rank, **progress))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
