"""A rank's process seen from its parent: start, hand over a run, follow beats, learn how it ended, leave nothing."""

import contextlib
import json
import os
import queue
import secrets
import signal
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.fork_server import INTERPRETER
from cluster.protocol import Json
from cluster.rank import describe_error
from cluster.supervise import RankEnd, classify
from recipes.errors import Preempted

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


class ForkServerProcess:
    """A fork server that this process starts and ends.

    A thread starts it and waits for it: the kernel ends a child with the *thread* that made it.
    """

    def __init__(self, environment: Mapping[str, str], preload: str | None) -> None:
        # An abstract address leaves no file behind; the server takes nobody else's requests.
        self.address = f"\0trainwright-{secrets.token_hex(8)}"
        self.output = os.memfd_create("output")
        self._process: subprocess.Popen[bytes] | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(
            target=self._live, args=(dict(environment), preload or ""), name="fork-server", daemon=True
        )
        self._thread.start()
        self._started.wait()

    def kill(self) -> None:
        """SIGKILL; the kernel ends every process that it forked."""
        if self._process is not None:
            self._process.kill()

    def wait(self) -> int:
        """Its exit status, once it has ended."""
        self._thread.join()
        assert self._process is not None
        return self._process.returncode

    def _live(self, environment: dict[str, str], preload: str) -> None:
        path = os.pathsep.join([PROJECT, *filter(None, [environment.get("PYTHONPATH")])])
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self.address)
            listener.listen()
            handle = listener.fileno()
            self._process = subprocess.Popen(
                [*INTERPRETER, "cluster.fork_server", str(handle), str(os.getpid()), preload],
                env={**environment, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=self.output,
                stderr=self.output,
                pass_fds=[handle],
                start_new_session=True,
            )
        self._started.set()
        self._process.wait()

    def __del__(self) -> None:
        os.close(self.output)


class ForkServer:
    """A connection to a fork server. Raises `OSError` where none listens."""

    def __init__(self, address: str, own: ForkServerProcess | None = None) -> None:
        self.output = os.memfd_create("output") if own is None else own.output
        """What processes have printed that had no log yet; an own server's words too."""
        self._own = own
        self._asked: deque[RankProcess] = deque()
        self._children: dict[int, RankProcess] = {}
        self._lock = threading.Lock()
        self._returncode: int | None = None
        self._link = socket.socket(socket.AF_UNIX)
        self._link.connect(address)
        threading.Thread(target=self._listen, name="fork-server-link", daemon=True).start()

    @property
    def is_alive(self) -> bool:
        """Whether it can fork."""
        return self._returncode is None

    def fork(self, process: "RankProcess", handles: Sequence[int]) -> None:
        """Asks for a process, which starts once the imports are done: `on_start` and `on_end` say what came of it."""
        with self._lock:
            if self._returncode is not None:
                process.on_end(self._returncode)
                return
            self._asked.append(process)
            with contextlib.suppress(OSError):  # it is gone: its end comes
                socket.send_fds(self._link, [b"f"], [*handles, self.output])

    def close(self) -> None:
        """Hangs up, which ends every process that was forked over this connection; an own server ends too."""
        with contextlib.suppress(OSError):
            self._link.shutdown(socket.SHUT_RDWR)
        if self._own is not None:
            self._own.kill()

    def _listen(self) -> None:
        with contextlib.suppress(ConnectionResetError), self._link.makefile("rb") as lines:
            for line in lines:
                self._hear(json.loads(line))
        returncode = -signal.SIGKILL if self._own is None else self._own.wait()
        with self._lock:
            self._returncode = returncode
            for child in self._children.values():
                child.on_end(-signal.SIGKILL)  # with their server
            for process in self._asked:
                process.on_end(returncode)

    def _hear(self, said: Json) -> None:
        match said["say"]:
            case "forked":
                child = self._children[said["pid"]] = self._asked.popleft()
                child.on_start(said["pid"])
            case "ended":
                self._children.pop(said["pid"]).on_end(said["returncode"])

    def __del__(self) -> None:
        self._link.close()
        if self._own is None:
            os.close(self.output)


class RankProcess:
    """One process for one rank: hand over a run, follow beats, learn how it ended."""

    def __init__(self, server: ForkServer) -> None:
        self.pid = 0
        """0 until the server has forked it."""
        self.beat = Beat("", {}, time.monotonic(), 0)
        self._server = server
        self._is_unwanted = False
        self._dead = threading.Event()
        self._returncode: int | None = None
        self._ends: queue.SimpleQueue[Json] = queue.SimpleQueue()
        self._order: Json | None = None
        self._oom_before = 0
        self._log_start = 0
        self._rss_bytes = 0
        self._stopped_at: float | None = None
        self._lock = threading.Lock()
        self._stacks = os.memfd_create("stacks")
        self._ours, theirs = socket.socketpair()
        with theirs:
            server.fork(self, [theirs.fileno(), self._stacks])
        threading.Thread(target=self._listen, name="rank-process", daemon=True).start()

    @property
    def is_alive(self) -> bool:
        """Whether the process runs, or will."""
        return not self._dead.is_set()

    def on_start(self, pid: int) -> None:
        """The server has forked it."""
        self.pid = pid
        if self._is_unwanted:
            self.kill()

    def on_end(self, returncode: int) -> None:
        """The process is reaped, or never was."""
        self._returncode = returncode
        self._dead.set()
        # A child that the target forked may hold the other end open. What was sent before can still be read.
        with contextlib.suppress(OSError):
            self._ours.shutdown(socket.SHUT_RD)

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
        """Asks the target to stop; a process that still waits for its imports is given up."""
        self._send({"do": "stop"})
        if not self.pid and not self._is_unwanted:
            self._is_unwanted = True
            self._ends.put({"say": "error", **describe_error(Preempted("stopped before it started"))})

    def kill(self) -> None:
        """SIGKILL for the process and everything in its process group."""
        self._is_unwanted = True
        if self.pid and self.is_alive:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits until the process is reaped; not for one that was given up before it started."""
        return (not self.pid and self._is_unwanted) or self._dead.wait(timeout_s)

    def rss_bytes(self) -> int:
        """Resident memory, the last known if the process is gone."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
            self._rss_bytes = pages * os.sysconf("SC_PAGE_SIZE")
        return self._rss_bytes

    def silent_s(self) -> float:
        """Seconds since the last beat."""
        return time.monotonic() - self.beat.at

    def stopped_s(self) -> float:
        """Seconds for which a signal has had the process stopped, as far as this was called meanwhile."""
        state = ""
        with contextlib.suppress(OSError):
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        if state != "T":
            self._stopped_at = None
            return 0.0
        now = time.monotonic()
        if self._stopped_at is None:
            self._stopped_at = now
        return now - self._stopped_at

    def stacks(self, timeout_s: float = 2.0) -> str:
        """Python stacks of all threads, whatever they wait for; empty if the process cannot answer.

        A stopped process continues, to answer.
        """
        if not (self.pid and self.is_alive):
            return ""
        before = os.fstat(self._stacks).st_size
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGUSR1)
            os.kill(self.pid, signal.SIGCONT)
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

    def _listen(self) -> None:
        with contextlib.suppress(ConnectionResetError), self._ours.makefile("rb") as lines:
            for line in lines:
                self._hear(json.loads(line))
        self._finish()
        self._ends.put({"say": "died", "returncode": self._returncode})

    def _hear(self, message: Json) -> None:
        match message["say"]:
            case "beat":
                self.beat = Beat(message["phase"], message["progress"], time.monotonic(), self.beat.number + 1)
            case _:
                self._ends.put(message)

    def _finish(self) -> None:
        if not self.pid and self._is_unwanted:
            return  # it ends as soon as it starts
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
            output = self._server.output
            text = os.pread(output, TAIL_BYTES, max(0, os.fstat(output).st_size - TAIL_BYTES)).decode(errors="replace")
        return text.splitlines()[-TAIL_LINES:]

    def __del__(self) -> None:
        os.close(self._stacks)
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
    if has_gpu:
        # Asked in the other way, how many GPUs there are, CUDA's driver would not work in a forked process.
        settings |= {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    else:
        settings |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return {**kept, **settings, **extra}
