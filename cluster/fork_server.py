"""A fork server: `python -m cluster.fork_server`. Imports once, then forks a process for each run of a rank.

Imports of a training stage take seconds of CPU, a fork some hundredths of a second, and the pages are shared. Nothing
but imports happens here, in one thread, so that what is forked is what a new interpreter would have been.

Workers connect to its socket and speak JSON lines. In, with three file descriptors (the rank's socket, its file for
stacks, its first output): `fork`. Out: `forked`, and `ended` once the process is reaped. The processes of a worker that
hangs up are killed.
"""

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import struct
import sys
import traceback
from dataclasses import dataclass

from cluster import rank
from cluster.rank import die_with_parent

INTERPRETER = (sys.executable, "-P", "-m")
"""-P: a folder of the user's that is called `recipes` or `launch` must not be imported from."""


def main(listener_fd: int, parent_pid: int, preload: str) -> None:
    """Serves until the parent is gone."""
    die_with_parent(parent_pid)
    # A SIGTERM to everybody asks the ranks to save: they would die with this process. Ranks set handlers of their own.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.set_inheritable(listener_fd, False)
    listener = socket.socket(fileno=listener_fd)
    if preload:
        try:
            importlib.import_module(preload)
        except Exception:
            # The rank imports the same, fails in the same way, and says so in its verdict.
            traceback.print_exc()
    gc.freeze()
    serve(listener)


@dataclass(frozen=True, slots=True)
class Child:
    """A forked process and the worker that asked for it."""

    pid: int
    worker: socket.socket


def serve(listener: socket.socket) -> None:
    """Forks on request and reports every end."""
    workers: dict[int, socket.socket] = {}
    children: dict[int, Child] = {}  # by pidfd
    waiting = select.poll()
    waiting.register(listener, select.POLLIN)
    while True:
        for ready, _ in waiting.poll():
            if ready == listener.fileno():
                worker, _ = listener.accept()
                if is_ours(worker):
                    workers[worker.fileno()] = worker
                    waiting.register(worker, select.POLLIN)
                else:
                    worker.close()
            elif ready in workers:
                worker = workers[ready]
                request, handles, _, _ = receive(worker)
                if request:
                    pid = fork([listener, *workers.values()], handles)
                    with contextlib.suppress(PermissionError, ProcessLookupError):
                        os.setpgid(pid, pid)  # the child does it too: whoever hears of it may kill the group
                    child = os.pidfd_open(pid)
                    children[child] = Child(pid, worker)
                    waiting.register(child, select.POLLIN)
                    say(worker, {"say": "forked", "pid": pid})
                else:
                    waiting.unregister(worker)
                    del workers[ready]
                    for left in children.values():
                        if left.worker is worker:
                            kill_group(left.pid)
                    worker.close()
            else:
                waiting.unregister(ready)
                ended = children.pop(ready)
                os.close(ready)
                say(ended.worker, {"say": "ended", "pid": ended.pid, "returncode": reap(ended.pid)})


def is_ours(worker: socket.socket) -> bool:
    """Whether the peer is a process of this user: an abstract address is open to everyone on the machine."""
    credentials = worker.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", credentials)
    return bool(uid == os.getuid())


def receive(worker: socket.socket) -> tuple[bytes, list[int], int, object]:
    """One request with its file descriptors; empty when the worker is gone."""
    try:
        return socket.recv_fds(worker, 1, 3)
    except ConnectionResetError:
        return b"", [], 0, None


def say(worker: socket.socket, message: dict[str, object]) -> None:
    """One line to a worker, if it is still there."""
    with contextlib.suppress(OSError):
        worker.sendall(json.dumps(message).encode() + b"\n")


def fork(sockets: list[socket.socket], handles: list[int]) -> int:
    """A process that serves a rank, without the server's sockets; returns its id."""
    server = os.getpid()
    pid = os.fork()
    if pid:
        for handle in handles:
            os.close(handle)
        return pid
    try:
        os.setpgid(0, 0)
        for opened in sockets:
            opened.close()
        connection, stacks, output = handles
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        if driver_was_touched():
            for handle in (connection, stacks):
                os.set_inheritable(handle, True)
            os.execv(sys.executable, [*INTERPRETER, "cluster.rank", str(connection), str(stacks), str(server)])
        rank.main(connection, stacks, server)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def driver_was_touched() -> bool:
    """Whether an import has called CUDA's driver, which does not work in a forked process: then a new interpreter."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda._is_in_bad_fork()


def reap(pid: int) -> int:
    """Ends what an ended process left in its process group; returns its exit status, negative for a signal."""
    # Wait without reaping first: while the leader is a zombie its process group id cannot be anyone else's.
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    kill_group(pid)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_group(pid: int) -> None:
    """SIGKILL for a process and everything in its group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
