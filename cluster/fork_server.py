"""The fork server of one rank: `python -m cluster.fork_server`. Imports once, then forks a process for each run.

Imports of a training stage take seconds of CPU, a fork some hundredths of a second, and the pages are shared. Nothing
but imports happens here, in one thread, so that what is forked is what a new interpreter would have been.

It speaks JSON lines with the worker that started it, on an inherited socket. In, with three file descriptors (the
rank's socket, its file for stacks, its first output): `fork`. Out: `forked`, and `ended` once the process is reaped.
"""

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import traceback

from cluster import rank
from cluster.rank import die_with_parent

INTERPRETER = (sys.executable, "-P", "-m")
"""-P: a folder of the user's that is called `recipes` or `launch` must not be imported from."""


def main(control_fd: int, parent_pid: int, preload: str) -> None:
    """Serves until the worker is gone."""
    die_with_parent(parent_pid)
    # A SIGTERM to everybody asks the ranks to save: they would die with this process. Ranks set handlers of their own.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.set_inheritable(control_fd, False)
    control = socket.socket(fileno=control_fd)
    if preload:
        try:
            importlib.import_module(preload)
        except Exception:
            # The rank imports the same, fails in the same way, and says so in its verdict.
            traceback.print_exc()
    gc.freeze()
    serve(control)


def serve(control: socket.socket) -> None:
    """Forks on request and reports every end."""
    children: dict[int, int] = {}  # by pidfd
    waiting = select.poll()
    waiting.register(control, select.POLLIN)
    while True:
        for ready, _ in waiting.poll():
            if ready == control.fileno():
                request, handles, _, _ = socket.recv_fds(control, 1, 3)
                if not request:
                    return
                pid = fork(control, handles)
                with contextlib.suppress(PermissionError, ProcessLookupError):
                    os.setpgid(pid, pid)  # the child does it too: whoever hears of it may kill the group
                child = os.pidfd_open(pid)
                children[child] = pid
                waiting.register(child, select.POLLIN)
                say(control, {"say": "forked", "pid": pid})
            else:
                waiting.unregister(ready)
                pid = children.pop(ready)
                os.close(ready)
                say(control, {"say": "ended", "pid": pid, "returncode": reap(pid)})


def say(control: socket.socket, message: dict[str, object]) -> None:
    """One line to the worker."""
    control.sendall(json.dumps(message).encode() + b"\n")


def fork(control: socket.socket, handles: list[int]) -> int:
    """A process that serves a rank; returns its id."""
    server = os.getpid()
    pid = os.fork()
    if pid:
        for handle in handles:
            os.close(handle)
        return pid
    try:
        os.setpgid(0, 0)
        control.close()
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
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
