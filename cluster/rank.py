"""The process of one rank, forked by `cluster.fork_server`: runs a target, leaves.

It speaks JSON lines with the worker that asked for it, on an inherited socket. In: `run`, `stop`. Out: `beat`,
`result`, `error`. The target runs in the main thread, so that it may set signal handlers.
"""

import atexit
import ctypes
import errno
import faulthandler
import importlib
import io
import json
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from recipes.errors import Preempted

PR_SET_PDEATHSIG = 1


def main(socket_fd: int, stacks_fd: int, parent_pid: int) -> None:
    """Serves runs until one was the last, or until the parent is gone."""
    die_with_parent(parent_pid)
    for handle in (socket_fd, stacks_fd):
        os.set_inheritable(handle, False)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, file=stacks_fd, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    link = Link(socket.socket(fileno=socket_fd))
    signal.signal(signal.SIGTERM, link.on_sigterm)
    threading.Thread(target=link.listen, name="link", daemon=True).start()
    threading.Thread(target=link.flush_beats, name="beats", daemon=True).start()
    is_reusable = True
    while is_reusable:
        order = link.orders.get()
        if not _serve(link, order):
            _leave(1)
        is_reusable = order["reusable"]
    atexit._run_exitfuncs()
    _leave(0)


def die_with_parent(parent_pid: int) -> None:
    """Asks the kernel for SIGKILL when the parent ends, and leaves if that has happened already."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)


class Link:
    """The socket to the worker, and what came over it."""

    def __init__(self, connection: socket.socket) -> None:
        self.orders: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.stop = threading.Event()
        self.has_unsaved: Callable[[], bool] = lambda: False
        """Whether the target has something to lose, and so answers a stop itself."""
        self._connection = connection
        self._lock = threading.Lock()
        self._beat: dict[str, Any] | None = None
        self._phase = ""
        self._sent_at = 0.0

    def listen(self) -> None:
        """Reads orders; the end of the stream means that the worker is gone."""
        with self._connection.makefile("rb") as lines:
            for line in lines:
                order = json.loads(line)
                match order["do"]:
                    case "run":
                        self.orders.put(order)
                    case "stop":
                        self.ask_to_stop()
        os.killpg(0, signal.SIGKILL)

    def send(self, message: dict[str, Any]) -> None:
        """One message, from any thread."""
        data = json.dumps(message).encode() + b"\n"
        with self._lock:
            self._connection.sendall(data)

    def beat(self, phase: str, progress: dict[str, Any]) -> None:
        """Sends a new phase at once, the rest a few times a second."""
        self._beat = {"say": "beat", "phase": phase, "progress": progress}
        if phase != self._phase or time.monotonic() - self._sent_at > 0.2:
            self._phase = phase
            self.flush_beat()

    def flush_beat(self) -> None:
        """Sends the latest beat, if it is still to be sent."""
        with self._lock:
            beat, self._beat = self._beat, None
            if beat is not None:
                self._sent_at = time.monotonic()
                self._connection.sendall(json.dumps(beat).encode() + b"\n")

    def flush_beats(self) -> None:
        """Sees to it that the last beat before a silence arrives."""
        while True:
            time.sleep(0.25)
            self.flush_beat()

    def ask_to_stop(self) -> None:
        """Leaves the stop to a target that answers it; any other has nothing to save and is ended here and now."""
        self.stop.set()
        if not self.has_unsaved():
            self.leave()

    def leave(self) -> None:
        """Says that the run was stopped, and ends this process with all its children."""
        said = f"stopped in {self._phase or 'start'}; what was saved before is kept"
        print(said, flush=True)
        self.send({"say": "error", **describe_error(Preempted(said))})
        os.killpg(0, signal.SIGKILL)

    def on_sigterm(self, number: int, frame: FrameType | None) -> None:
        """The first SIGTERM asks to stop, the second ends the process."""
        if self.stop.is_set():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        # The handler may interrupt code that holds the lock.
        threading.Thread(target=self.ask_to_stop, name="stop", daemon=True).start()


class Context:
    """`WorkerContext` of this process."""

    def __init__(self, link: Link, order: dict[str, Any]) -> None:
        self._link = link
        self.rank: int = order["rank"]
        self.world_size: int = order["world_size"]
        self.local_rank: int = order["local_rank"]
        self.node: str = order["node"]

    def beat(self, phase: str, **progress: Any) -> None:
        """Says where this rank is."""
        self._link.beat(phase, progress)

    def stop_requested(self) -> bool:
        """Whether the driver, or a SIGTERM, asked to stop."""
        return self._link.stop.is_set()

    @contextmanager
    def answers_stops(self, has_unsaved: Callable[[], bool] = lambda: True) -> Iterator[None]:
        """While it is open, a stop is left to the target where it has something to lose; else it ends this process."""
        self._link.has_unsaved = has_unsaved
        yield
        self._link.has_unsaved = lambda: False
        if self._link.stop.is_set():
            self._link.leave()


class LogFile(io.RawIOBase):
    """The log behind standard output; it often shares a disk with the store.

    A line that finds no room is lost: the training that prints it waits for room, and a full disk must not make a
    print() end it.
    """

    def writable(self) -> bool:
        """Always."""
        return True

    def fileno(self) -> int:
        """Standard output's."""
        return 1

    def write(self, data: Any) -> int:
        """Write what fits."""
        try:
            return os.write(1, data)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            return len(memoryview(data).cast("B"))


def find_target(target: str) -> Any:
    """The function that "module:function" names."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def _serve(link: Link, order: dict[str, Any]) -> bool:
    os.environ.update(order["environment"])
    Path("/proc/self/comm").write_text(f"rank-{order['rank']}")
    log = os.open(order["log_path"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    sys.stdout = sys.stderr = io.TextIOWrapper(LogFile(), errors="replace", write_through=True)
    try:
        result = find_target(order["target"])(order["payload"], Context(link, order))
        answer = json.dumps(result)
    except BaseException as error:
        traceback.print_exc()
        link.send({"say": "error", **describe_error(error)})
        return False
    link.flush_beat()
    link.send({"say": "result", "result": json.loads(answer)})
    return True


def describe_error(error: BaseException) -> dict[str, Any]:
    """An exception as JSON; its errno is that of the first OSError in its chain."""
    number: int | None = None
    link: BaseException | None = error
    while link is not None and number is None:
        number = link.errno if isinstance(link, OSError) else None
        link = link.__cause__ or link.__context__
    code = getattr(type(error), "exit_code", None)
    return {
        "error": type(error).__name__,
        "message": str(error),
        "traceback": "".join(traceback.format_exception(error)),
        "errno": number,
        "exit_code": code if isinstance(code, int) else 4,
        "at": time.time(),
    }


def _leave(status: int) -> None:
    # A thread or a destructor of a library may wait for peers that are gone: leave without them.
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
