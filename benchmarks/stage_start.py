"""How long a stage takes to start: spare processes against new Ray actors, in one run.

    python benchmarks/stage_start.py [--rounds 3] [--workers 2] [--preload trainers.preload]

Start is from the moment when the previous stage's results are with the driver to the moment when every rank has joined
the process group. Both sides import the same module and join in the same way. `spares`: the group's own way, where the
imports happened while the stage before worked. `actors`: the plain way, new Ray actors for each stage. `cold`: the
group's way without spares. Sides take turns.
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
    """Imports, joins, says when; works on for a while so that spares have the time that a stage gives them."""
    importlib.import_module(payload["preload"])
    from trainers.distributed import join, leave

    join()
    joined_at = time.time()
    worker.beat("work", step=0)
    time.sleep(payload["stage_s"])
    leave()
    return {"joined_at": joined_at}


class PlainActor:
    """One rank as a Ray actor that serves one stage."""

    def run(self, payload: dict[str, Any], environment: dict[str, str]) -> float:
        """Joins and says when."""
        import os

        os.environ.update(environment)
        importlib.import_module(payload["preload"])
        from trainers.distributed import join, leave

        join()
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
    parser.add_argument("--preload", default="trainers.preload")
    parser.add_argument("--stage-s", type=float, default=20.0, help="how long a stage works, and so a spare may import")
    choice = parser.parse_args()
    from cluster.protocol import WorkerSpec
    from cluster.session import start

    payload = {"preload": choice.preload, "stage_s": 0.0}
    seconds: dict[str, list[float]] = {"spares": [], "cold": [], "actors": []}
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
        with session.group(spec) as group:

            def begin(stage_s: float, spares: bool) -> float:
                started_at = time.time()
                results = group.run("stage_start:join", {**payload, "stage_s": stage_s}, spares=spares)
                return max(result["joined_at"] for result in results if result) - started_at

            for turn in range(choice.rounds):
                seconds["cold"].append(begin(choice.stage_s, spares=True))
                seconds["spares"].append(begin(0.0, spares=False))
                seconds["actors"].append(start_plain_actors(payload, choice.workers, 19_000 + turn))
        began = time.time()
        session.shutdown()
        print(f"Ray ended in {time.time() - began:.2f} s")
    for side, values in seconds.items():
        listed = " ".join(f"{value:.2f}" for value in values)
        print(f"{side:7} median {statistics.median(values):.2f} s  ({listed})")
    print(f"actors / spares = {statistics.median(seconds['actors']) / statistics.median(seconds['spares']):.1f}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(HERE).parent))
    main()
