"""A connection to Ray: a small cluster of our own that leaves nothing behind, or an existing one, left as it was."""

import atexit
import contextlib
import importlib
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from cluster import watchdog
from cluster.environment import variables
from cluster.hardware import find_processors
from cluster.protocol import WorkerGroup, WorkerSpec
from cluster.rank_process import ForkServerProcess, rank_environment
from cluster.ray_start import (
    EMBEDDED_SETTINGS,
    SERVICES,
    connect_as_job,
    end_services,
    few_services,
    forget_token,
    quiet_loggers,
    silence,
)
from cluster.topology import Node
from recipes.errors import CapacityError

MARK = "TRAINWRIGHT_SESSION"
OBJECT_STORE_BYTES = 80 * 2**20  # Ray's least is 75 MiB; nothing of size goes through it
TEMPORARY = "t"  # in the folder of an embedded Ray: what ranks write on the way
SHUTDOWN_TIMEOUT_S = 10.0
CONNECT_TIMEOUT_S = 30.0
REACH_TIMEOUT_S = 1.0
START_TIMEOUT_S = 120.0
SOCKET_PATH_ROOM = 30  # Ray's socket paths under the folder take up to 67 of the 107 bytes that the kernel allows


def start(
    address: str | None = None,
    *,
    log_folder: Path | None = None,
    num_cpus: int | None = None,
    num_gpus: int | None = None,
    name: str = "run",
    preload: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> "Session":
    """Starts an embedded Ray (no address), or connects to the one at the address ("auto" or host:port).

    `log_folder` receives what Ray would print, and an embedded Ray's own logs when it ends. `preload`: beside an
    embedded Ray one fork server starts, which imports this once for every group without GPUs whose `WorkerSpec` has the
    same `preload` and `environment`. Raises `CapacityError` when
    Ray does not answer, `RuntimeError` when this process is connected to Ray already.
    """
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        raise RuntimeError("this process is connected to Ray already, and Ray's client is a global")
    if address is not None:
        return _connect(address, name, log_folder)
    session = _prepare_embedded(log_folder)
    if preload is not None:
        session.start_fork_server(preload, environment or {})
    _start_embedded(session, num_cpus, num_gpus)
    return session


def local_nodes() -> list[Node]:
    """What an embedded Ray would have, without starting it."""
    cpus, gpus = count_cpus(), count_gpus()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return [Node("local", "127.0.0.1", cpus, gpus, memory, cpus, gpus, **asdict(find_processors(num_gpus=gpus)))]


def count_cpus() -> int:
    """Cores that this process may use, by affinity and cgroup quota."""
    cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def count_gpus() -> int:
    """NVIDIA GPUs that this process may use."""
    present = sum(1 for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    return min(present, sum(1 for part in visible.split(",") if part.strip() not in ("", "-1")))


class Session:
    """Ray, connected. Only one at a time in a process: Ray's client is a global."""

    def __init__(self, *, namespace: str, folder: Path | None, log_folder: Path | None) -> None:
        self.namespace = namespace
        self.folder = folder
        """Of an embedded Ray; None on an existing cluster."""
        self._log_folder = log_folder
        self._guard: subprocess.Popen[bytes] | None = None
        self._mark = secrets.token_hex(8)
        self._imports: tuple[str, dict[str, str]] | None = None
        self._fork_server: ForkServerProcess | None = None
        self._groups: list[WorkerGroup] = []
        self._doors: dict[str, tuple[str, int]] = {}
        """Where the raylet of each node listens."""
        self._avoided: set[str] = set()
        self._services: list[tuple[str, psutil.Process]] = []
        self._is_shut_down = False
        self._cancelled = threading.Event()
        self._ended = threading.Event()
        self._keeper_done = threading.Event()

    @property
    def is_embedded(self) -> bool:
        """Whether this process started Ray."""
        return self.folder is not None

    @property
    def rank_environment(self) -> dict[str, str]:
        """What ranks get beside their group's own: temporary files of an embedded Ray's go with its folder."""
        return {} if self.folder is None else {"TMPDIR": str(self.folder / TEMPORARY)}

    def start_fork_server(self, preload: str, environment: Mapping[str, str]) -> None:
        """Starts the imports that groups here share; returns at once."""
        self._imports = (preload, dict(environment))
        extra = {**self.rank_environment, **environment, MARK: self._mark}
        self._fork_server = ForkServerProcess(rank_environment(os.environ, extra, threads=1, has_gpu=False), preload)

    def fork_server(self, spec: WorkerSpec) -> str | None:
        """Address of the fork server that has done this group's imports; None if there is none."""
        shares = self._imports == (spec.preload, dict(spec.environment))
        if self._fork_server is None or not shares or spec.gpus_per_worker or spec.cpus_per_worker >= 2:
            return None
        return self._fork_server.address

    def nodes(self) -> list[Node]:
        """Living nodes that are not avoided: totals, and what is free at this moment."""
        ray = importlib.import_module("ray")
        state = importlib.import_module("ray._private.state")
        find_free = getattr(state, "available_resources_per_node", None)
        free: dict[str, dict[str, float]] | None = find_free() if find_free else None
        found = []
        entries = [entry for entry in ray.nodes() if entry["Alive"]]
        self._doors = {entry["NodeID"]: (entry["NodeManagerAddress"], entry["NodeManagerPort"]) for entry in entries}
        avoided = self.avoided()
        for entry in entries:
            if entry["NodeID"] in avoided:
                continue
            total = entry["Resources"]
            left = total if free is None else free.get(entry["NodeID"], {})
            found.append(
                Node(
                    id=entry["NodeID"],
                    address=entry["NodeManagerAddress"],
                    cpus=total.get("CPU", 0.0),
                    gpus=total.get("GPU", 0.0),
                    memory_bytes=int(total.get("memory", 0)),
                    free_cpus=left.get("CPU", 0.0),
                    free_gpus=left.get("GPU", 0.0),
                )
            )
        return sorted(found, key=lambda node: (node.address, node.id))

    def cut_off(self, node_ids: Collection[str]) -> set[str]:
        """Those of the nodes whose raylet takes no connection; one that is too busy to answer takes it."""

        def takes_connection(node_id: str) -> bool:
            try:
                socket.create_connection(self._doors[node_id], timeout=REACH_TIMEOUT_S).close()
            except (KeyError, OSError):
                return False
            return True

        if not node_ids:
            return set()
        with ThreadPoolExecutor(min(32, len(node_ids))) as pool:
            taken = pool.map(takes_connection, node_ids)
            return {node_id for node_id, is_taken in zip(node_ids, taken, strict=True) if not is_taken}

    def avoid(self, node_id: str) -> None:
        """Uses this node no more until it can be reached again: Ray takes a minute to give one up."""
        self._avoided.add(node_id)

    def avoided(self) -> list[str]:
        """Ids of nodes that could not be reached and cannot be yet, though Ray still counts on them."""
        self._avoided = self.cut_off(self._avoided & self._doors.keys())
        return sorted(self._avoided)

    def close_at_shutdown(self, group: WorkerGroup) -> None:
        """Closes the group when the session ends, unless that was done before."""
        self._groups.append(group)

    def cancel(self) -> None:
        """From any thread or signal handler: groups that wait for resources give up with `Preempted`."""
        self._cancelled.set()

    @property
    def is_cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled.is_set()

    def trouble(self) -> str:
        """Empty, or which process of an embedded Ray has ended: nothing works after it, and Ray says so much later."""
        for name, service in self._services:
            if not service.is_running() or service.status() == psutil.STATUS_ZOMBIE:
                return f"{name} (process {service.pid}) has ended"
        return ""

    def watch(self, pids: list[int]) -> None:
        """Tells the watchdog of processes on this machine whose shared memory it has to clean up."""
        if self._guard and self._guard.stdin:
            with contextlib.suppress(OSError):
                self._guard.stdin.write(b"".join(b"%d\n" % pid for pid in pids))
                self._guard.stdin.flush()

    def hear(self, message: str) -> None:
        """Keeps what Ray would print on the terminal."""
        if self._log_folder is not None:
            with contextlib.suppress(OSError):
                (self._log_folder / "ray").mkdir(parents=True, exist_ok=True)
                with (self._log_folder / "ray" / "messages.log").open("a") as log:
                    log.write(message + "\n")

    def shutdown(self) -> None:
        """Closes every group; an embedded Ray then ends with its processes, files and shared memory. Idempotent."""
        if self._is_shut_down:
            return
        self._is_shut_down = True
        ray = importlib.import_module("ray")
        if ray.is_initialized() and not self.trouble():
            for group in self._groups:
                with contextlib.suppress(Exception):  # a group that cannot be closed must not keep the rest alive
                    group.close()
        if self._fork_server is not None:
            self._fork_server.kill()
        self._keep_logs()
        # In a thread, because without its services Ray's own end may take a minute.
        ending = threading.Thread(target=ray.shutdown, name="ray-shutdown", daemon=True)
        ending.start()
        ending.join(SHUTDOWN_TIMEOUT_S)
        self._ended.set()
        self._keeper_done.wait(5)
        if self._guard and self._guard.stdin:
            with contextlib.suppress(OSError):
                self._guard.stdin.write(b"done\n")
                self._guard.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._guard.wait(watchdog.SWEEP_DEADLINE_S + 3)
        atexit.unregister(self.shutdown)

    def _keep_logs(self) -> None:
        if self.folder is None or self._log_folder is None:
            return
        kept = self._log_folder / "ray"
        for pattern in ("raylet.*", "gcs_server.*", "*_agent.err"):
            for path in (self.folder / "r" / "session_latest" / "logs").glob(pattern):
                with contextlib.suppress(OSError):
                    if path.stat().st_size:
                        kept.mkdir(parents=True, exist_ok=True)
                        with path.open("rb") as log:
                            log.seek(max(0, path.stat().st_size - 2**20))
                            (kept / path.name).write_bytes(log.read())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()


def _prepare_embedded(log_folder: Path | None) -> Session:
    """The folder of an embedded Ray, and the watchdog that removes it."""
    parent = tempfile.gettempdir()
    try:
        folder = Path(tempfile.mkdtemp(prefix="tw-", dir=parent if len(parent) <= SOCKET_PATH_ROOM - 12 else "/tmp"))
    except OSError as error:
        raise CapacityError(f"no temporary folder for an embedded Ray: {error}") from error
    session = Session(namespace="trainwright", folder=folder, log_folder=log_folder)
    # The watchdog first: from here on nothing can be left behind.
    mark = f"{MARK}={session._mark}"
    session._guard = subprocess.Popen(
        [sys.executable, "-I", "-S", "-E", watchdog.__file__, str(os.getpid()), str(folder), mark],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
    )
    (folder / TEMPORARY).mkdir()
    return session


def _start_embedded(session: Session, num_cpus: int | None, num_gpus: int | None) -> None:
    folder = session.folder
    assert folder is not None
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    environment = {**EMBEDDED_SETTINGS, "RAY_AUTH_TOKEN_PATH": str(token), MARK: session._mark}

    def initialise() -> None:
        with variables(environment, without=("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ADDRESS")), few_services():
            forget_token()
            settings: dict[str, Any] = {
                "address": "local",
                "num_cpus": num_cpus if num_cpus is not None else count_cpus(),
                "num_gpus": num_gpus if num_gpus is not None else count_gpus(),
                "object_store_memory": OBJECT_STORE_BYTES,
                "include_dashboard": False,
                "namespace": session.namespace,
                "_node_ip_address": "127.0.0.1",
                # Ray opens its folder to everyone; the one around it stays ours.
                "_temp_dir": str(folder / "r"),
            }
            try:
                connect_as_job(**settings)
            except Exception:
                # Ray gives its raylet 30 s, which a machine that is very busy for a moment may not have.
                end_services(folder)
                connect_as_job(**settings)
            children = psutil.Process().children()
            session._services = [(SERVICES[name], child) for child in children if (name := child.name()) in SERVICES]

    _run_in_keeper(session, initialise, START_TIMEOUT_S, "an embedded Ray did not start")


def _connect(address: str, name: str, log_folder: Path | None) -> Session:
    session = Session(namespace=f"trainwright-{name}-{secrets.token_hex(4)}", folder=None, log_folder=log_folder)

    def initialise() -> None:
        connect_as_job(address=address, namespace=session.namespace)

    _run_in_keeper(session, initialise, CONNECT_TIMEOUT_S, f"no Ray cluster answers at {address}")
    return session


def _run_in_keeper(session: Session, initialise: Callable[[], None], timeout_s: float, trouble: str) -> None:
    """Runs it in a thread that stays until shutdown: the kernel ends Ray's processes with the thread that made them."""
    outcome: list[BaseException | None] = []
    started = threading.Event()

    def keep() -> None:
        try:
            importlib.import_module("ray")
            atexit.register(session.shutdown)  # after Ray's own, and so run before it
            with quiet_loggers():
                silence(session.hear)
                initialise()
            outcome.append(None)
        except BaseException as error:
            outcome.append(error)
        started.set()
        session._ended.wait()
        session._keeper_done.set()

    threading.Thread(target=keep, name="ray-keeper", daemon=True).start()
    if not started.wait(timeout_s):
        session.shutdown()
        raise CapacityError(f"{trouble} within {timeout_s:g} s")
    if outcome[0] is not None:
        session.shutdown()
        raise CapacityError(f"{trouble}: {outcome[0]}") from outcome[0]
