"""Sees to it that nothing of an embedded Ray outlives the process that started it, even after SIGKILL.

Run by file, apart from the package, as `python -I -S -E watchdog.py PARENT FOLDER MARK`, in a session of its own. Its
standard input is a pipe from the parent: lines name process ids of workers; the word `done` or the end of the stream,
or the parent's end, start the sweep. What belongs to the embedded Ray is known by the mark in its environment; Ray's
agents, whose process title overwrites it, by the logs under the folder that they write.
"""

# ruff: noqa: SIM105  (contextlib would double what this process imports)

import os
import select
import signal
import sys
import time

SWEEP_DEADLINE_S = 9.0


def belongs(pid: str, folder: str, mark: bytes) -> bool:
    """Whether a process is one of ours."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as environment:
            if mark in environment.read():
                return True
        with open(f"/proc/{pid}/cmdline", "rb") as command:
            if b"ray" not in command.read():
                return False
        for handle in os.listdir(f"/proc/{pid}/fd"):
            if os.readlink(f"/proc/{pid}/fd/{handle}").startswith(folder + "/") and is_written(pid, handle):
                return True
    except OSError:
        pass
    return False


def is_written(pid: str, handle: str) -> bool:
    """Whether an open file is open for writing: who only reads in the folder is a passer-by."""
    with open(f"/proc/{pid}/fdinfo/{handle}") as info:
        flags = next(line for line in info if line.startswith("flags:"))
    return int(flags.split()[1], 8) & (os.O_WRONLY | os.O_RDWR) != 0


def ours(folder: str, mark: bytes, parent: int) -> list[int]:
    """Process ids; not zombies, whose files and environment are gone, and not the parent, which has Ray's logs open."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) not in (os.getpid(), parent) and belongs(name, folder, mark):
            found.append(int(name))
    return found


def shared_memory(pid: int) -> set[str]:
    """Files in /dev/shm that a process has mapped or open."""
    found: set[str] = set()
    try:
        with open(f"/proc/{pid}/maps") as maps:
            for line in maps:
                if "/dev/shm/" in line and not line.endswith("(deleted)\n"):
                    found.add(line[line.index("/dev/shm/") :].strip())
    except OSError:
        pass
    return found


def remove(folder: str) -> None:
    """A folder with everything in it, as far as possible."""
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    for entry in entries:
        try:
            if entry.is_dir(follow_symlinks=False):
                remove(entry.path)
            else:
                os.unlink(entry.path)
        except OSError:
            pass
    try:
        os.rmdir(folder)
    except OSError:
        pass


def sweep(folder: str, mark: bytes, parent: int, workers: set[int]) -> int:
    """Kills, waits, removes; returns how many processes had to be killed."""
    killed: set[int] = set()
    shared: set[str] = set()
    deadline = time.monotonic() + SWEEP_DEADLINE_S
    quiet = 0
    while quiet < 2 and time.monotonic() < deadline:
        left = ours(folder, mark, parent)
        for pid in left:
            shared |= shared_memory(pid)
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
            except OSError:
                pass
        quiet = 0 if left else quiet + 1
        time.sleep(0.05)
    for name in os.listdir("/dev/shm") if os.path.isdir("/dev/shm") else []:
        parts = name.split("_")
        if len(parts) > 2 and parts[0] == "torch" and parts[1].isdigit() and int(parts[1]) in killed | workers:
            shared.add("/dev/shm/" + name)
    if shared:
        for name in os.listdir("/proc"):
            if name.isdigit():
                shared -= shared_memory(int(name))
    for path in shared:
        try:
            os.unlink(path)
        except OSError:
            pass
    for _ in range(20):
        remove(folder)
        if not os.path.exists(folder):
            break
        time.sleep(0.1)
    return len(killed)


def main(parent: int, folder: str, mark: bytes) -> None:
    """Waits for the parent's word or end, then sweeps."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    workers: set[int] = set()
    waiting = select.poll()
    waiting.register(0, select.POLLIN | select.POLLHUP)
    is_parent_alive = True
    try:
        waiting.register(os.pidfd_open(parent), select.POLLIN)
    except ProcessLookupError:
        is_parent_alive = False
    except OSError:
        pass
    rest = b""
    while is_parent_alive:
        handles = [handle for handle, _ in waiting.poll()]
        if 0 not in handles:
            break
        data = os.read(0, 4096)
        *lines, rest = (rest + data).split(b"\n")
        workers |= {int(line) for line in lines if line.isdigit()}
        if not data or b"done" in lines:
            break
    sweep(folder, mark, parent, workers)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3].encode())
