"""How Ray is started and made quiet, with what it has no public switch for; where its names differ, it is noisier."""

import contextlib
import functools
import importlib
import logging
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from cluster.rank_process import PROJECT
from cluster.worker import find_free_ports

SERVICES = {"raylet": "Ray's raylet", "gcs_server": "Ray's control service"}

# Of no use to a cluster that lives as long as one run, and each costs the start CPU time.
EMBEDDED_SETTINGS = {
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


@contextlib.contextmanager
def few_services() -> Iterator[None]:
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


def connect_as_job(**settings: Any) -> None:
    """`ray.init` with workers that find our packages, and not a folder of the same name where the user stands."""
    ray = importlib.import_module("ray")
    job: Any = importlib.import_module("ray.job_config").JobConfig()
    job._py_driver_sys_path = [PROJECT]
    # Ray puts the working folder in front of its workers' import path, unless the job brings a folder of its own.
    with _replaced(type(job), "_runtime_env_has_working_dir", lambda _: True):
        ray.init(job_config=job, log_to_driver=False, logging_level=logging.ERROR, **settings)


def end_services(folder: Path) -> None:
    """What a start that failed has left: Ray forgets it."""
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if child.name() in SERVICES and (child.status() == psutil.STATUS_ZOMBIE or _is_of(child, folder)):
                child.kill()
                child.wait()


def _is_of(process: psutil.Process, folder: Path) -> bool:
    return any(str(folder) in part for part in process.cmdline())


def forget_token() -> None:
    """An earlier session's token stays cached in Ray's native code."""
    loader: Any = getattr(importlib.import_module("ray._raylet"), "AuthenticationTokenLoader", None)
    if loader is not None:
        loader.instance().reset_cache()


def silence(hear: Callable[[str], None]) -> None:
    """Ray prints what its raylets report on the driver's terminal, whatever it was told about logs."""
    worker: Any = importlib.import_module("ray._private.worker")
    if hasattr(worker, "print_to_stdstream"):
        worker.print_to_stdstream = lambda data, *_, **__: hear("\n".join(map(str, data.get("lines", []))))


@contextlib.contextmanager
def quiet_loggers() -> Iterator[None]:
    """Ray sets the level of its logger when it starts; errors alone are heard during and after it."""
    logger = logging.getLogger("ray")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(max(before, logging.ERROR))
