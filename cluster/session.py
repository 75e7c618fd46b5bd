"""A connection to Ray: a small cluster of our own that leaves nothing behind, or an existing one, left as it was."""

import atexit
import contextlib
import functools
import importlib
import logging
import os
import secrets
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from cluster import watchdog
from cluster.protocol import WorkerGroup, WorkerSpec
from cluster.rank_process import PROJECT
from cluster.topology import Node
from cluster.worker import find_free_ports
from recipes.errors import CapacityError

MARK = "TRAINWRIGHT_SESSION"
OBJECT_STORE_BYTES = 80 * 2**20  # Ray's least is 75 MiB; nothing of size goes through it
TEMPORARY = "t"  # in the folder of an embedded Ray: what ranks write on the way
SHUTDOWN_TIMEOUT_S = 10.0
CONNECT_TIMEOUT_S = 30.0
START_TIMEOUT_S = 120.0
SOCKET_PATH_ROOM = 30  # Ray's socket paths under the folder take up to 67 of the 107 bytes that the kernel allows

_SERVICES = {"raylet": "Ray's raylet", "gcs_server": "Ray's control service"}

# Of no use to a cluster that lives as long as one run, and each costs the start CPU time.
_EMBEDDED_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_event_stats": "0",
    "RAY_worker_num_grpc_internal_threads": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",  # 15 by default
}
# Their services are for people who watch a cluster: the autoscaler's monitor, the dashboard, the collector of logs.
_UNWANTED_SERVICES = ("start_monitor", "start_api_server", "start_log_monitor")


def start(
    address: str | None = None,
    *,
    log_folder: Path | None = None,
    num_cpus: int | None = None,
    num_gpus: int | None = None,
    name: str = "run",
) -> "Session":
    """Starts an embedded Ray (no address), or connects to the one at the address ("auto" or host:port).

    `log_folder` receives what Ray would print, and an embedded Ray's own logs when it ends. Raises `CapacityError` when
    Ray does not answer, `RuntimeError` when this process is connected to Ray already.
    """
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        raise RuntimeError("this process is connected to Ray already, and Ray's client is a global")
    return _start_embedded(log_folder, num_cpus, num_gpus) if address is None else _connect(address, name, log_folder)


def local_nodes() -> list[Node]:
    """What an embedded Ray would have, without starting it."""
    cpus, gpus = count_cpus(), count_gpus()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return [Node("local", "127.0.0.1", cpus, gpus, memory, cpus, gpus)]


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
        self._groups: list[WorkerGroup] = []
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

    def nodes(self) -> list[Node]:
        """Living nodes: totals, and what is free at this moment."""
        ray = importlib.import_module("ray")
        state = importlib.import_module("ray._private.state")
        find_free = getattr(state, "available_resources_per_node", None)
        free: dict[str, dict[str, float]] | None = find_free() if find_free else None
        found = []
        for entry in ray.nodes():
            if not entry["Alive"]:
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

    def group(self, spec: WorkerSpec, on_wait: Callable[[str], None] | None = None) -> WorkerGroup:
        """A worker group here: its resources are held from now on. `on_wait` hears who holds them while it waits.

        Raises `CapacityError` at once when the cluster can never take it, or when the spec's deadline passes.
        """
        from cluster.ray_group import RayGroup

        group = RayGroup(self, spec, on_wait)
        self._groups.append(group)
        return group

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


def _start_embedded(log_folder: Path | None, num_cpus: int | None, num_gpus: int | None) -> Session:
    parent = tempfile.gettempdir()
    try:
        folder = Path(tempfile.mkdtemp(prefix="tw-", dir=parent if len(parent) <= SOCKET_PATH_ROOM - 12 else "/tmp"))
    except OSError as error:
        raise CapacityError(f"no temporary folder for an embedded Ray: {error}") from error
    mark = f"{MARK}={secrets.token_hex(8)}"
    session = Session(namespace="trainwright", folder=folder, log_folder=log_folder)
    # The watchdog first: from here on nothing can be left behind.
    session._guard = subprocess.Popen(
        [sys.executable, "-I", "-S", "-E", watchdog.__file__, str(os.getpid()), str(folder), mark],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
    )
    (folder / TEMPORARY).mkdir()
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    environment = {
        **_EMBEDDED_SETTINGS,
        "RAY_AUTH_TOKEN_PATH": str(token),
        MARK: mark.partition("=")[2],
    }

    def initialise() -> None:
        with _environment(environment, without=("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ADDRESS")), _few_services():
            _forget_token()
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
                _connect_as_job(**settings)
            except Exception:
                # Ray gives its raylet 30 s, which a machine that is very busy for a moment may not have.
                _end_services(folder)
                _connect_as_job(**settings)
            children = psutil.Process().children()
            session._services = [(_SERVICES[name], child) for child in children if (name := child.name()) in _SERVICES]

    _run_in_keeper(session, initialise, START_TIMEOUT_S, "an embedded Ray did not start")
    return session


def _connect(address: str, name: str, log_folder: Path | None) -> Session:
    session = Session(namespace=f"trainwright-{name}-{secrets.token_hex(4)}", folder=None, log_folder=log_folder)

    def initialise() -> None:
        _connect_as_job(address=address, namespace=session.namespace)

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
            with _quiet_loggers():
                _silence(session.hear)
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


@contextlib.contextmanager
def _environment(values: dict[str, str], without: tuple[str, ...]) -> Iterator[None]:
    touched = {*values, *without}
    before = {key: os.environ.get(key) for key in touched}
    for key in without:
        os.environ.pop(key, None)
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


@contextlib.contextmanager
def _few_services() -> Iterator[None]:
    """Ray has no public switch for these; where its private names differ, it starts them and all is well but slower."""
    node: Any = getattr(importlib.import_module("ray._private.node"), "Node", None)
    services: Any = importlib.import_module("ray._private.services")
    utils: Any = importlib.import_module("ray._private.utils")
    native: Any = importlib.import_module("ray._raylet")
    start_raylet = getattr(node, "start_raylet", None)

    def start_raylet_at_once(self: Any, *arguments: Any, **settings: Any) -> Any:
        # The raylet waits for files in which its agents name their ports, until they have imported all they need; it
        # dies if that takes them 15 s, as it may on a busy machine. Nothing here needs the agents: name the ports now.
        with contextlib.suppress(AttributeError):
            port = find_free_ports(1)[0]
            for name in ("METRICS_AGENT", "METRICS_EXPORT", "DASHBOARD_AGENT_LISTEN"):
                native.persist_port(self._session_dir, self._node_id, getattr(native, f"{name}_PORT_NAME"), -1)
            native.persist_port(self._session_dir, self._node_id, native.RUNTIME_ENV_AGENT_PORT_NAME, port)
            self._ray_params.runtime_env_agent_port = port
        assert start_raylet is not None
        return start_raylet(self, *arguments, **settings)

    with contextlib.ExitStack() as stack:
        for name in _UNWANTED_SERVICES:
            stack.enter_context(_replaced(node, name, lambda *_, **__: None))
        stack.enter_context(_replaced(node, "start_raylet", start_raylet_at_once))
        # Imports much of the dashboard to see whether it is installed; an error makes a smaller agent.
        stack.enter_context(_replaced(utils, "get_dashboard_dependency_error", lambda: ImportError("not wanted")))
        # In process groups of their own: who ends a job signals the driver's whole group, and Ray has to outlive that.
        popen = functools.partial(getattr(services, "ConsolePopen", subprocess.Popen), process_group=0)
        stack.enter_context(_replaced(services, "ConsolePopen", popen))
        # Ray turns 127.0.0.1 into the machine's outward address; on one machine nobody listens there.
        stack.enter_context(_replaced(services, "resolve_ip_for_localhost", lambda address: address))
        yield


@contextlib.contextmanager
def _replaced(place: Any, name: str, stand_in: Any) -> Iterator[None]:
    """Replaces an attribute for a while, if there is one."""
    if not hasattr(place, name):
        yield
        return
    original = getattr(place, name)
    setattr(place, name, stand_in)
    try:
        yield
    finally:
        setattr(place, name, original)


def _connect_as_job(**settings: Any) -> None:
    """`ray.init` with workers that find our packages, and not a folder of the same name where the user stands."""
    ray = importlib.import_module("ray")
    job: Any = importlib.import_module("ray.job_config").JobConfig()
    job._py_driver_sys_path = [PROJECT]
    # Ray puts the working folder in front of its workers' import path, unless the job brings a folder of its own.
    with _replaced(type(job), "_runtime_env_has_working_dir", lambda _: True):
        ray.init(job_config=job, log_to_driver=False, logging_level=logging.ERROR, **settings)


def _end_services(folder: Path) -> None:
    """What a start that failed has left: Ray forgets it."""
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if child.name() in _SERVICES and (child.status() == psutil.STATUS_ZOMBIE or _is_of(child, folder)):
                child.kill()
                child.wait()


def _is_of(process: psutil.Process, folder: Path) -> bool:
    return any(str(folder) in part for part in process.cmdline())


def _forget_token() -> None:
    """An earlier session's token stays cached in Ray's native code."""
    loader: Any = getattr(importlib.import_module("ray._raylet"), "AuthenticationTokenLoader", None)
    if loader is not None:
        loader.instance().reset_cache()


def _silence(hear: Callable[[str], None]) -> None:
    """Ray prints what its raylets report on the driver's terminal, whatever it was told about logs."""
    worker: Any = importlib.import_module("ray._private.worker")
    if hasattr(worker, "print_to_stdstream"):
        worker.print_to_stdstream = lambda data, *_, **__: hear("\n".join(map(str, data.get("lines", []))))


@contextlib.contextmanager
def _quiet_loggers() -> Iterator[None]:
    logger = logging.getLogger("ray")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(max(before, logging.ERROR))
