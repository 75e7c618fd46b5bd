"""The Ray actor that holds one rank: its resources, its processes, and what the driver asks about them.

A run is a process of its own (`cluster.rank`), so that this one can say how it ended and read its log after its death.
A fork server has done the imports, so that a run starts at once: the session's, or one of its own.
"""

import contextlib
import ctypes
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from cluster.protocol import Json
from cluster.rank import PR_SET_PDEATHSIG
from cluster.rank_process import ForkServer, ForkServerProcess, RankProcess, rank_environment
from cluster.supervise import RankEnd

LOG_CHUNK_BYTES = 1 << 20
PACKAGES = ("trainwright", "ray", "torch", "deepspeed", "transformers", "peft")
# Below the range from which Linux takes outgoing ports, so that nobody is given the port between choice and use.
QUIET_PORTS = range(20_000, 30_000)


class Worker:
    """Holds one rank. Its methods are called by the driver, several at a time."""

    def __init__(
        self,
        extra_environment: Mapping[str, str],
        preload: str | None,
        threads: int,
        has_gpu: bool,
        fork_server: str | None = None,
    ) -> None:
        # Ray notices a dead raylet after seconds; the kernel does at once.
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        self._environment = rank_environment(os.environ, extra_environment, threads, has_gpu)
        self._preload = preload
        self._shared_server = fork_server
        """Address of one that has done this rank's imports; None: start an own one."""
        self._current: RankProcess | None = None
        self._server: ForkServer | None = None
        self._lock = threading.Lock()
        self._log_path: Path | None = None
        self._log_folder = ""
        self._run_id = ""

    def describe(self, node_address: str, drivers_machine: str) -> Json:
        """What the driver has to know: addresses, devices, versions, and where logs go that it cannot see itself."""
        if this_machine() != drivers_machine:
            self._log_folder = tempfile.mkdtemp(prefix="trainwright-logs-")
        return {
            "log_folder": self._log_folder,
            "pid": os.getpid(),
            "machine": this_machine(),
            "interface": interface_of(node_address),
            "gpus": [part for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part],
            "versions": installed_versions(),
        }

    def free_port(self) -> int:
        """A port that nothing listens on."""
        return find_free_ports(1)[0]

    def see_devices(self, devices: str) -> None:
        """Sets what every process of this rank sees; an import may already ask the driver for it."""
        self._environment["CUDA_VISIBLE_DEVICES"] = devices

    def prepare(self) -> None:
        """Sees to a fork server, which imports what a run needs: the shared one, or where that has ended an own one."""
        with self._lock:
            if self._server is not None and self._server.is_alive:
                return
            if self._shared_server is not None:
                address, self._shared_server = self._shared_server, None
                with contextlib.suppress(OSError):
                    self._server = ForkServer(address)
                    return
            own = ForkServerProcess(self._environment, self._preload)
            self._server = ForkServer(own.address, own)

    def run(self, order: Json) -> RankEnd:
        """Runs a target to its end, in the process of the run before if that may be, else in a new one."""
        current = self._current
        if not (current and current.is_alive and order["reusable"]):
            self.prepare()
            assert self._server is not None
            current = self._current = RankProcess(self._server)
        self._log_path = Path(order["log_path"])
        current.expect()
        self._run_id = order["run_id"]
        return current.run(order)

    def pulse(self, run_id: str, log_offset: int, with_log: bool, is_stopping: bool) -> Json:
        """The latest beat of that run, how long ago it was, what the log got since the offset; empty before the run.

        The wish to stop comes with every pulse: one that came before the run's process would be lost.
        """
        current = self._current
        if current is None or self._run_id != run_id:
            return {}
        if is_stopping:
            current.stop()
        reply: Json = {
            "number": current.beat.number,
            "phase": current.beat.phase,
            "progress": current.beat.progress,
            "silent_s": current.silent_s(),
            "stopped_s": current.stopped_s(),
            "pid": current.pid,
            "rss_bytes": current.rss_bytes(),
        }
        if with_log:
            reply["log"] = self.read_log(log_offset)
        return reply

    def read_log(self, offset: int) -> bytes:
        """Bytes of the current run's log from an offset on, a chunk at most."""
        return read_file(str(self._log_path), offset) if self._log_path else b""

    def abort(self) -> None:
        """Kills the run in progress."""
        if self._current:
            self._current.kill()

    def stacks(self) -> str:
        """Python stacks of the run in progress."""
        return self._current.stacks() if self._current else ""

    def close(self) -> None:
        """Ends every process of this rank."""
        if self._current is not None:
            self._current.kill()
            self._current.wait(5)
        if self._server is not None:
            self._server.close()
        if self._log_folder:
            shutil.rmtree(self._log_folder, ignore_errors=True)


def find_free_ports(count: int) -> list[int]:
    """Different ports that nothing listens on."""
    found: list[int] = []
    for port in random.Random().sample(QUIET_PORTS, 200):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            found.append(port)
        if len(found) == count:
            return found
    raise OSError("no free port")


def read_file(path: str, offset: int) -> bytes:
    """A chunk of a file from an offset on; empty if there is none."""
    with contextlib.suppress(OSError), open(path, "rb") as log:
        log.seek(offset)
        return log.read(LOG_CHUNK_BYTES)
    return b""


def take_folder(folder: str, path: str, offset: int) -> bytes:
    """What is left of a dead worker's log; its folder goes."""
    data = b""
    while chunk := read_file(path, offset + len(data)):
        data += chunk
    shutil.rmtree(folder, ignore_errors=True)
    return data


def this_machine() -> str:
    """Equal in two processes if, and only if, they see the same files."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}-{os.stat('/proc/self/ns/mnt').st_ino}"


def interface_of(address: str) -> str:
    """Name of the network interface that has the address; empty if none has."""
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in entries):
            return name
    return ""


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages by which ranks compute; a package that is not there says so."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found
