"""A rank's process seen from its parent: start, hand over a run, follow beats, learn how it ended, leave nothing."""

import contextlib
import json
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.protocol import Json
from cluster.supervise import RankEnd, classify

EXIT_DEADLINE_S = 5.0
TAIL_BYTES = 16_384
TAIL_LINES = 50
PROJECT = str(Path(__file__).resolve().parent.parent)


@dataclass(frozen=True, slots=True)
class Beat:
    """The latest thing a rank said."""

    phase: str
    progress: Json
    at: float
    """Monotonic seconds, taken on arrival."""
    number: int


class RankProcess:
    """One process for one rank.

    A thread starts it, reads what it says and waits for it: the kernel ends a child with the *thread* that made it, so
    that thread lives as long as the child.
    """

    def __init__(self, environment: Mapping[str, str], preload: str | None) -> None:
        self.pid = 0
        self.beat = Beat("", {}, time.monotonic(), 0)
        self.is_ready = threading.Event()
        self._environment = dict(environment)
        self._preload = preload or ""
        self._started = threading.Event()
        self._dead = threading.Event()
        self._ends: queue.SimpleQueue[Json] = queue.SimpleQueue()
        self._order: Json | None = None
        self._oom_before = 0
        self._log_start = 0
        self._rss_bytes = 0
        self._ours, self._theirs = socket.socketpair()
        self._stacks = os.memfd_create("stacks")
        self._early = os.memfd_create("early")
        self._lock = threading.Lock()
        threading.Thread(target=self._live, name="rank-process", daemon=True).start()
        self._started.wait()

    @property
    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self.pid != 0 and not self._dead.is_set()

    def expect(self) -> None:
        """Forgets the beats of the run before."""
        self.beat = Beat("start", {}, time.monotonic(), self.beat.number + 1)

    def run(self, order: Json) -> RankEnd:
        """Hands a run over and waits for its end; the process is gone after it, unless it is reusable and well."""
        self._order = order
        self._oom_before = oom_kills(os.getpid())
        with contextlib.suppress(FileNotFoundError):
            self._log_start = os.stat(order["log_path"]).st_size
        self._send({"do": "run", **order})
        said = self._ends.get()
        if not (order["reusable"] and said["say"] == "result"):
            self._finish()
        end = replace(self._end_of(said), phase=self.beat.phase, progress=self.beat.progress)
        self._order = None
        return end

    def stop(self) -> None:
        """Makes `stop_requested()` true in the target."""
        self._send({"do": "stop"})

    def leave(self) -> None:
        """Asks an idle process to exit."""
        self._send({"do": "exit"})

    def kill(self) -> None:
        """SIGKILL for the process and everything in its process group."""
        if self.is_alive:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits until the process is reaped."""
        return self._dead.wait(timeout_s)

    def rss_bytes(self) -> int:
        """Resident memory, the last known if the process is gone."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
            self._rss_bytes = pages * os.sysconf("SC_PAGE_SIZE")
        return self._rss_bytes

    def silent_s(self) -> float:
        """Seconds since the last beat."""
        return time.monotonic() - self.beat.at

    def stacks(self, timeout_s: float = 2.0) -> str:
        """Python stacks of all threads, whatever they wait for; empty if the process cannot answer."""
        if not self.is_alive:
            return ""
        before = os.fstat(self._stacks).st_size
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGUSR1)
        deadline = time.monotonic() + timeout_s
        size = before
        while time.monotonic() < deadline:
            time.sleep(0.05)
            grown = os.fstat(self._stacks).st_size
            if grown > before and grown == size:
                break
            size = grown
        return os.pread(self._stacks, 1 << 20, before).decode(errors="replace")

    def _send(self, message: Json) -> None:
        with contextlib.suppress(OSError), self._lock:
            self._ours.sendall(json.dumps(message).encode() + b"\n")

    def _live(self) -> None:
        process = self._spawn()
        self.pid = process.pid
        self._theirs.close()
        self._started.set()
        self._listen(os.pidfd_open(process.pid))
        self._reap(process)

    def _spawn(self) -> subprocess.Popen[bytes]:
        path = os.pathsep.join([PROJECT, *filter(None, [self._environment.get("PYTHONPATH")])])
        handles = (self._theirs.fileno(), self._stacks)
        return subprocess.Popen(
            # -P: a folder of the user's that is called `recipes` or `launch` must not be imported from.
            [sys.executable, "-P", "-m", "cluster.rank", *map(str, handles), str(os.getpid()), self._preload],
            env={**self._environment, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=self._early,
            stderr=self._early,
            pass_fds=handles,
            start_new_session=True,
        )

    def _listen(self, process: int) -> None:
        # A child that the target forked may hold the socket open: the process's own end counts, not the stream's.
        waiting = select.poll()
        waiting.register(process, select.POLLIN)
        waiting.register(self._ours, select.POLLIN)
        rest = b""
        while True:
            events = dict(waiting.poll())
            if self._ours.fileno() in events:
                data = b""
                with contextlib.suppress(ConnectionResetError):
                    data = self._ours.recv(1 << 16)
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    self._hear(json.loads(line))
                if not data:
                    break
            elif process in events:
                break
        os.close(process)

    def _hear(self, message: Json) -> None:
        match message["say"]:
            case "beat":
                self.beat = Beat(message["phase"], message["progress"], time.monotonic(), self.beat.number + 1)
            case "ready":
                if message["trouble"]:
                    os.write(self._early, message["trouble"].encode())
                self.is_ready.set()
            case _:
                self._ends.put(message)

    def _reap(self, process: subprocess.Popen[bytes]) -> None:
        # Wait without reaping first: while the leader is a zombie its process group id cannot be anyone else's.
        deadline = time.monotonic() + EXIT_DEADLINE_S
        while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
            if time.monotonic() > deadline:
                os.kill(process.pid, signal.SIGKILL)
            time.sleep(0.005)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        returncode = process.wait()
        self._dead.set()
        self._ends.put({"say": "died", "returncode": returncode})

    def _finish(self) -> None:
        if not self._dead.wait(EXIT_DEADLINE_S):
            self.kill()
            self._dead.wait(EXIT_DEADLINE_S)

    def _end_of(self, said: Json) -> RankEnd:
        assert self._order is not None
        rank, node = self._order["rank"], self._order["node"]
        if said["say"] == "result":
            return RankEnd(rank=rank, node=node, at=time.time(), kind="result", result=said["result"])
        return classify(
            rank,
            node,
            time.time(),
            error=said if said["say"] == "error" else None,
            returncode=said.get("returncode"),
            oom_kills=max(0, oom_kills(os.getpid()) - self._oom_before),
            rss_bytes=self._rss_bytes,
            last_phase=self.beat.phase,
            tail=self._tail(),
        )

    def _tail(self) -> list[str]:
        assert self._order is not None
        text = ""
        with contextlib.suppress(OSError), open(self._order["log_path"], "rb") as log:
            size = os.fstat(log.fileno()).st_size
            log.seek(max(self._log_start, size - TAIL_BYTES))
            text = log.read().decode(errors="replace")
        if not text:
            text = os.pread(self._early, TAIL_BYTES, max(0, os.fstat(self._early).st_size - TAIL_BYTES)).decode(
                errors="replace"
            )
        return text.splitlines()[-TAIL_LINES:]

    def __del__(self) -> None:
        for handle in (self._stacks, self._early):
            os.close(handle)
        self._ours.close()


def oom_kills(pid: int) -> int:
    """How many processes the kernel has killed for memory in that process's cgroup; 0 where it does not say."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                files = [f"/sys/fs/cgroup{path}/memory.events", "/sys/fs/cgroup/memory.events"]
            elif "memory" in controllers.split(","):
                files = [f"/sys/fs/cgroup/memory{path}/memory.oom_control", "/sys/fs/cgroup/memory/memory.oom_control"]
            else:
                continue
            for file in files:
                with contextlib.suppress(OSError):
                    counts = dict(row.split()[:2] for row in Path(file).read_text().splitlines())
                    if "oom_kill" in counts:
                        return int(counts["oom_kill"])
    return 0


def rank_environment(base: Mapping[str, str], extra: Mapping[str, str], threads: int, has_gpu: bool) -> dict[str, str]:
    """What a rank's interpreter starts with: the worker's environment without Ray's, thread counts, memory settings."""
    kept = {key: value for key, value in base.items() if not key.startswith("RAY_")}
    settings = {
        "OMP_NUM_THREADS": str(max(1, threads)),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # glibc gives large blocks back after each use and takes a page fault for every page of the next one.
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
        "MALLOC_TOP_PAD_": str(64 * 2**20),
    }
    if not has_gpu:
        settings |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return {**kept, **settings, **extra}
