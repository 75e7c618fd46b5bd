"""Fork servers: one import for many workers, and what ends with what."""

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.protocol import WorkerSpec
from cluster.rank_process import ForkServer, ForkServerProcess, RankProcess, rank_environment
from cluster.ray_group import RayGroup
from cluster.session import start
from cluster.supervise import RankEnd

HERE = str(Path(__file__).resolve().parent)
ENVIRONMENT = {"PYTHONPATH": HERE}
BEATING = {"target": "cluster_targets:beat_often", "payload": {"steps": 20_000}}

pytestmark = pytest.mark.serial


@pytest.fixture
def server() -> Iterator[ForkServerProcess]:
    """A server that has imported `preloaded`."""
    process = ForkServerProcess(rank_environment(os.environ, ENVIRONMENT, threads=1, has_gpu=False), "preloaded")
    yield process
    process.kill()
    process.wait()


def order(folder: Path, rank: int, **changes: Any) -> dict[str, Any]:
    """A run for one rank."""
    defaults = {
        "target": "cluster_targets:echo",
        "payload": {},
        "rank": rank,
        "world_size": 2,
        "local_rank": rank,
        "node": "127.0.0.1",
        "environment": {},
        "log_path": str(folder / f"{rank}.log"),
        "reusable": False,
    }
    return {**defaults, **changes}


def run_aside(process: RankProcess, what: dict[str, Any]) -> tuple[threading.Thread, list[RankEnd]]:
    """A run in a thread, once its process is there; its end is appended."""
    ends: list[RankEnd] = []
    thread = threading.Thread(target=lambda: ends.append(process.run(what)))
    thread.start()
    wait_for(lambda: process.pid != 0 and process.beat.phase == "train")
    return thread, ends


def wait_for(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Polls; fails after the time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_two_workers_share_the_imports(server: ForkServerProcess, tmp_path: Path) -> None:
    """Both ranks were forked by the same process, after one import."""
    links = [ForkServer(server.address) for _ in range(2)]
    results = [RankProcess(link).run(order(tmp_path, rank)).result for rank, link in enumerate(links)]
    assert [result["rank"] for result in results if result] == [0, 1]
    assert len({result["preloaded_at"] for result in results if result}) == 1
    assert len({result["pid"] for result in results if result}) == 2


def test_hanging_up_ends_the_own_processes_only(server: ForkServerProcess, tmp_path: Path) -> None:
    """A worker that is gone takes its rank with it, and nobody else's."""
    links = [ForkServer(server.address) for _ in range(2)]
    processes = [RankProcess(link) for link in links]
    runs = [run_aside(process, order(tmp_path, rank, **BEATING)) for rank, process in enumerate(processes)]
    links[0].close()
    runs[0][0].join(10)
    assert runs[0][1][0].kind == "signal"
    wait_for(lambda: not links[0].is_alive)
    assert psutil.pid_exists(processes[1].pid)
    assert links[1].is_alive
    processes[1].kill()
    runs[1][0].join(10)


def test_a_dead_server_ends_every_process(server: ForkServerProcess, tmp_path: Path) -> None:
    """The kernel kills them; a run that was asked for afterwards ends at once; nobody listens any more."""
    link = ForkServer(server.address)
    process = RankProcess(link)
    thread, ends = run_aside(process, order(tmp_path, 0, **BEATING))
    server.kill()
    thread.join(10)
    assert "signal 9 (SIGKILL): rank 0" in ends[0].message
    wait_for(lambda: not psutil.pid_exists(process.pid))
    assert not link.is_alive
    assert RankProcess(link).run(order(tmp_path, 1)).kind == "signal"
    with pytest.raises(OSError, match="refused"):
        ForkServer(server.address)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can start a process of another user")
def test_another_user_is_refused(server: ForkServerProcess) -> None:
    """It is hung up on, whatever it asks."""
    python = shutil.which("python3", path="/usr/bin:/bin")
    if python is None:
        pytest.skip("no interpreter that every user may run")
    script = (
        f"import socket; link = socket.socket(socket.AF_UNIX); link.connect({server.address!r}); print(link.recv(1))"
    )
    found = subprocess.run([python, "-I", "-c", script], user=65534, capture_output=True, text=True, timeout=30)
    assert found.stdout.strip() == "b''", found.stderr


def test_groups_of_an_embedded_ray_share_one(tmp_path: Path) -> None:
    """Two groups, one import; when the server has ended, workers start servers of their own."""

    def spec(name: str, **fields: Any) -> WorkerSpec:
        common: dict[str, Any] = {"log_folder": tmp_path, "preload": "preloaded", "environment": ENVIRONMENT}
        return WorkerSpec(name=name, num_workers=1, **{**common, **fields})

    with start(log_folder=tmp_path, num_cpus=2, num_gpus=0, preload="preloaded", environment=ENVIRONMENT) as session:
        groups = [
            RayGroup(session, spec("learners")),
            RayGroup(session, spec("verifier", cpus_per_worker=0, reusable=True)),
        ]
        first = [group.run("cluster_targets:echo", {})[0] for group in groups]
        assert len({result["preloaded_at"] for result in first if result}) == 1
        with RayGroup(session, spec("others", environment={**ENVIRONMENT, "OTHER": "1"}, cpus_per_worker=0)) as other:
            (own,) = other.run("cluster_targets:echo", {})
        learner, verifier = first
        assert own
        assert learner
        assert verifier
        assert own["preloaded_at"] != learner["preloaded_at"]
        (shared,) = [child for child in psutil.Process().children() if "cluster.fork_server" in child.cmdline()]
        os.kill(shared.pid, signal.SIGKILL)
        wait_for(lambda: not psutil.pid_exists(verifier["pid"]))
        time.sleep(0.5)  # until the workers have heard of it
        again = [group.run("cluster_targets:echo", {})[0] for group in groups]
        assert all(result and result["preloaded_at"] > learner["preloaded_at"] for result in again)
