"""How long a stage takes to start: a fork of a process that has the imports, against new Ray actors, in one run.

    python benchmarks/stage_start.py [--rounds 3] [--workers 2] [--preload trainers.runtime.preload]

Start is from the moment when the previous stage's results are with the driver to the moment when every rank has joined
the process group. Both sides import the same module and join in the same way. `first`: a new worker group, with its
imports. `next`: a later stage of that group. `actors`: the plain way, new Ray actors for each stage. Sides take turns.
"""

import argparse
import importlib
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = str(Path(__file__).resolve().parent)


def join(payload: dict[str, Any], worker: Any) -> dict[str, Any]:
    """Imports, joins, says when."""
    importlib.import_module(payload["preload"])
    from trainers.runtime.distributed import barrier, join, leave

    join()
    barrier()
    joined_at = time.time()
    leave()
    return {"joined_at": joined_at}


class PlainActor:
    """One rank as a Ray actor that serves one stage."""

    def run(self, payload: dict[str, Any], environment: dict[str, str]) -> float:
        """Joins and says when."""
        import os

        os.environ.update(environment)
        importlib.import_module(payload["preload"])
        from trainers.runtime.distributed import barrier, join, leave

        join()
        barrier()
        joined_at = time.time()
        leave()
        return joined_at


def start_plain_actors(payload: dict[str, Any], workers: int, port: int) -> float:
    """Seconds until new actors have joined."""
    import ray

    started_at = time.time()
    actors = [ray.remote(PlainActor).options(num_cpus=0).remote() for _ in range(workers)]
    common = {
        "WORLD_SIZE": str(workers),
        "LOCAL_WORLD_SIZE": str(workers),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    settings = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1"}
    calls = [
        actor.run.remote(payload, {**common, **settings, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank, actor in enumerate(actors)
    ]
    joined_at = max(ray.get(calls, timeout=300))
    for actor in actors:
        ray.kill(actor)
    return joined_at - started_at


def main() -> None:
    """Measures and prints one line per side and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--preload", default="trainers.runtime.preload")
    choice = parser.parse_args()
    from cluster.protocol import WorkerSpec
    from cluster.ray_group import RayGroup
    from cluster.session import start

    payload = {"preload": choice.preload}
    seconds: dict[str, list[float]] = {"first": [], "next": [], "actors": []}
    with tempfile.TemporaryDirectory() as logs:
        began = time.time()
        session = start(log_folder=Path(logs))
        print(f"Ray started in {time.time() - began:.2f} s")
        spec = WorkerSpec(
            name="learners",
            num_workers=choice.workers,
            log_folder=Path(logs),
            preload=choice.preload,
            environment={"PYTHONPATH": HERE},
        )
        for turn in range(choice.rounds):
            started_at = time.time()
            with RayGroup(session, spec) as group:
                for side in ("first", "next"):
                    results = group.run("stage_start:join", payload)
                    seconds[side].append(max(result["joined_at"] for result in results if result) - started_at)
                    started_at = time.time()
            seconds["actors"].append(start_plain_actors(payload, choice.workers, 19_000 + turn))
        began = time.time()
        session.shutdown()
        print(f"Ray ended in {time.time() - began:.2f} s")
    for side, values in seconds.items():
        listed = " ".join(f"{value:.2f}" for value in values)
        print(f"{side:7} median {statistics.median(values):.2f} s  ({listed})")
    print(f"actors / next = {statistics.median(seconds['actors']) / statistics.median(seconds['next']):.1f}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(HERE).parent))
    main()
