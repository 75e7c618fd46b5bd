"""What worker groups run in these tests; imported in rank processes through PYTHONPATH."""

import importlib
import mmap
import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from recipes.errors import Preempted


def echo(payload: dict[str, Any], worker: Any) -> dict[str, Any]:
    """Returns what it got and where it ran."""
    worker.beat("work", step=1)
    print(f"echo from rank {worker.rank}")
    time.sleep(payload.get("seconds", 0))
    keys = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
    keys += ["OMP_NUM_THREADS", "DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES"]
    return {
        "payload": payload,
        "rank": worker.rank,
        "world_size": worker.world_size,
        "pid": os.getpid(),
        "environment": {key: os.environ.get(key) for key in keys},
        "has_ray": any(name.split(".")[0] == "ray" for name in sys.modules)
        or any(key.startswith("RAY_") for key in os.environ),
        "niceness": os.getpriority(os.PRIO_PROCESS, 0),
        "preloaded_at": getattr(sys.modules.get("preloaded"), "IMPORTED_AT", None),
        "runs_in_process": count_run(),
        "touched": "touching" in sys.modules,
    }


RUNS: list[int] = []


def count_run() -> int:
    """How many runs this process has served."""
    RUNS.append(os.getpid())
    return len(RUNS)


def beat_often(payload: dict[str, Any], worker: Any) -> dict[str, Any]:
    """Many beats, as a training loop sends them."""
    for step in range(payload["steps"]):
        worker.beat("train", step=step, loss=1.0 / (step + 1))
        time.sleep(0.002)
    return {"steps": payload["steps"]}


def fail_on(payload: dict[str, Any], worker: Any) -> None:
    """One rank fails in the way asked for; the others wait, and then fail as a process group does."""
    if worker.rank != payload["rank"]:
        worker.beat("train", step=7)
        time.sleep(payload.get("others_after_s", 30))
        raise RuntimeError("[gloo/transport/tcp/pair.cc:525] Connection closed by peer [127.0.0.1]:4242")
    worker.beat("train", step=payload.get("step", 7))
    print("last words of the rank", flush=True)
    match payload["how"]:
        case "raise":
            raise ValueError("the loss is a fish")
        case "disk":
            raise OSError(28, "No space left on device")
        case "exit":
            os._exit(3)
        case "hang":
            time.sleep(600)
        case number:
            os.kill(os.getpid(), int(number))
            time.sleep(600)


def wait_for_stop(payload: dict[str, Any], worker: Any) -> dict[str, Any]:
    """A loop that saves and leaves when asked."""
    with worker.answers_stops():
        worker.beat("train", step=1)
        while not worker.stop_requested():
            time.sleep(0.01)
        if payload.get("finish"):
            return {"stopped": True}
        raise Preempted(f"saved at step 1 of rank {worker.rank}")


def ignore_stop(payload: dict[str, Any], worker: Any) -> None:
    """A loop that would answer a stop, and never looks."""
    with worker.answers_stops():
        worker.beat("train", step=1)
        time.sleep(600)


def work_on(payload: dict[str, Any], worker: Any) -> None:
    """Work with nothing to save, which leaves Python for long, where a stop is answered or not."""
    with worker.answers_stops(lambda: False) if payload["in_loop"] else nullcontext():
        worker.beat("data")
        subprocess.run(["sleep", "600"], check=True)


def leave_litter(payload: dict[str, Any], worker: Any) -> None:
    """Holds shared memory and a temporary folder, and has a child in a process group of its own."""
    tempfile.mkdtemp(prefix="litter-")
    path = Path(f"/dev/shm/torch_{os.getpid()}_1_1")
    path.write_bytes(b"x" * 4096)
    with path.open("r+b") as file:
        mapped = mmap.mmap(file.fileno(), 4096)
    child = subprocess.Popen(["sleep", "600"], start_new_session=True)
    worker.beat("litter", path=str(path), child=child.pid)
    time.sleep(600)
    mapped.close()


def all_reduce(payload: dict[str, Any], worker: Any) -> dict[str, Any]:
    """A real process group from torchrun's variables."""
    import torch

    torch.distributed.init_process_group("gloo")
    total = torch.tensor([float(worker.rank + 1)])
    torch.distributed.all_reduce(total)
    torch.distributed.destroy_process_group()
    return {"sum": total.item()}


def key_of_the_group(payload: dict[str, Any], worker: Any) -> dict[str, Any]:
    """What the keys of this run's process group begin with."""
    return {"key": os.environ["TRAINWRIGHT_GROUP_KEY"]}


def look_at_sockets(payload: dict[str, Any], worker: Any) -> dict[str, Any]:
    """The process group that stages use: where this rank listens, and whether a stranger gets in."""
    import deepspeed
    import psutil
    import torch

    from trainers.runtime import distributed

    importlib.import_module("trainers.engine.deepspeed")  # or DeepSpeed compiles an operator that no stage has

    ranks = distributed.join()
    distributed.barrier()
    group = torch.distributed.group.WORLD
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    kept = torch.distributed.group.WORLD is group
    total = distributed.all_sum([ranks.rank + 1.0])
    address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    try:
        socket.create_connection(address, timeout=1.0).close()
        stranger = "gets in"
    except TimeoutError:
        stranger = "gets no answer"
    exchanged = distributed.side_exchange()(ranks.rank)
    listening = [
        entry.laddr.ip for entry in psutil.Process().net_connections("inet") if entry.status == psutil.CONN_LISTEN
    ]
    distributed.barrier()
    distributed.leave()
    return {
        "listening": listening,
        "stranger": stranger,
        "kept": kept,
        "sum": total,
        "exchanged": exchanged,
        "key": os.environ["TRAINWRIGHT_GROUP_KEY"],
    }


def stage_where_unmounted(payload: dict[str, Any], worker: Any) -> Any:
    """A stage of which the last rank's node has an empty folder in the store's place; the other ranks wait for it."""
    if worker.rank == worker.world_size - 1:
        from launch.runs.stage_entry import run_stage

        return run_stage(payload, worker)
    while True:
        time.sleep(0.1)
