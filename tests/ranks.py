"""Run a function on N ranks, a process each: the one way in which tests do so."""

import functools
import importlib.util
import multiprocessing
import os
import pickle
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Generic, Literal, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
Device = Literal["cpu", "cuda"]

LOST_S = 500.0
"""A rank that takes longer is lost."""
SETTLE_S = 0.5
"""Who failed first may be seen last."""
ON_CPU = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
PRELOADED = [
    "trainers.runtime.preload",
    "launch.runs.stage_entry",
    "rlhf.task",
    "rlhf.text.reward_stage",
    "rlhf.text.preference_stage",
]
"""What is imported once; ranks are forked from there, as in production."""


@dataclass(frozen=True)
class Ended(Generic[T]):
    """How a group's ranks ended."""

    codes: list[int | None]
    """Exit codes by rank, negative for a signal; None: the rank was killed here, because another had failed."""
    results: dict[int, T]
    """What the function returned, by rank; a rank that failed has none."""
    logs: str
    """The end of what each rank printed."""


def run_ranks(folder: Path, workers: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> list[T]:
    """Call a function on every rank, on the CPU, and return its results by rank; a rank that fails, fails the test.

    The function joins the group itself, by torchrun's variables (`distributed.join`). It and its arguments are pickled,
    so it has to be a function of a module. FOLDER gets a log of each rank.
    """
    ended = start_ranks(folder, workers, functools.partial(function, *args, **kwargs))
    assert ended.codes == [0] * workers, f"exit codes {ended.codes}\n{ended.logs}"
    return [ended.results[rank] for rank in range(workers)]


def start_ranks(folder: Path, workers: int, call: Callable[[], T], device: Device = "cpu") -> Ended[T]:
    """Call a function on every rank until all have ended; as soon as one fails, the others are killed."""
    folder.mkdir(parents=True, exist_ok=True)
    logs, found = ([folder / f"rank{rank}.{name}" for rank in range(workers)] for name in ("log", "result"))
    port = free_port()
    context = _forking() if device == "cpu" else multiprocessing.get_context("spawn")
    processes: list[BaseProcess] = []
    try:
        for rank in range(workers):
            found[rank].unlink(missing_ok=True)
            variables = {
                "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": workers, "LOCAL_WORLD_SIZE": workers,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TRAINWRIGHT_CACHE": folder / "cache",
            }  # fmt: skip
            environment = {name: str(value) for name, value in variables.items()}
            process = context.Process(target=_be_rank, args=(call, environment, logs[rank], found[rank]))  # type: ignore[attr-defined]
            process.start()
            processes.append(process)
        _wait(processes)
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    results = {rank: pickle.loads(path.read_bytes()) for rank, path in enumerate(found) if path.is_file()}
    return Ended(codes, results, "\n".join(log.read_text()[-3000:] for log in logs if log.is_file()))


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait(processes: list[BaseProcess]) -> None:
    """Wait for all to end, or for one to fail."""
    deadline = time.monotonic() + LOST_S
    while running := [process.sentinel for process in processes if process.exitcode is None]:
        connection.wait(running, timeout=1.0)
        if any(process.exitcode for process in processes) or time.monotonic() > deadline:
            time.sleep(SETTLE_S)
            return


@functools.cache
def _forking() -> BaseContext:
    missing = [name for name in PRELOADED if importlib.util.find_spec(name) is None]
    assert not missing, f"{missing} cannot be imported: without a word every rank would import what they import"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    before = dict(os.environ)
    os.environ.update(ON_CPU)  # libraries read them when they are imported
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def _be_rank(call: Callable[[], object], environment: dict[str, str], log: Path, found: Path) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environment)
    found.write_bytes(pickle.dumps(call()))
