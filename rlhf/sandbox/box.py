"""The sandbox from the inside: a small program that runs tests of code which nobody has read, each in a process that
sees no file, no network and no process of this machine.

It is started as a fresh interpreter with the standard library alone (`runner.py`), reads jobs as lines of JSON and
answers with lines of JSON. For each job: `serve` (outside) -> `_enter` (makes the namespaces) -> `_first` (process 1
in them, which nothing inside can kill) -> `_attempt` (one process for each test: restricted, then runs the code).
"""

import json
import os
import resource
import secrets
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from rlhf.sandbox import kernel

INSIDE = 1000
"""The user and group that code runs as, as it sees them."""
NOBODY = 65534
"""Who that is outside where the trainer is root; else the trainer's own user."""
OPEN_FILES = 64
POLL_S = 0.05
CANARY = "\nraise AssertionError('a test that cannot pass')\n"


def serve() -> None:
    """Answer jobs until the input ends."""
    mount_point = tempfile.mkdtemp(prefix="sandbox-")
    try:
        for line in sys.stdin.buffer:
            print(json.dumps(_job(json.loads(line), mount_point)), flush=True)
    finally:
        os.rmdir(mount_point)


def _job(job: dict[str, Any], mount_point: str) -> dict[str, Any]:
    """`verdicts` of a job's tests, or `broken`: why the sandbox could not be set up."""
    told, told_in = os.pipe()
    go_out, go = os.pipe()
    child = os.fork()
    if child == 0:
        for descriptor in (told, go):
            os.close(descriptor)
        _enter(job, mount_point, told_in, go_out)
    for descriptor in (told_in, go_out):
        os.close(descriptor)
    try:
        return _watch(job, child, told, go)
    finally:
        os.kill(child, signal.SIGKILL)  # its own child, process 1, ends with it, and everything inside with that
        os.waitpid(child, 0)
        os.close(told)
        os.close(go)


def _watch(job: dict[str, Any], child: int, told: int, go: int) -> dict[str, Any]:
    """Read verdicts while time and memory last."""
    number = len(job["tests"]) + 1
    ends_at = time.monotonic() + 10 + number * (job["wall_s"] + 1)
    verdicts: list[dict[str, Any]] = []
    found, stopped = b"", "wall"
    while time.monotonic() < ends_at:
        ready, _, _ = select.select([told], [], [], POLL_S)
        if not ready:
            if _memory(child) > job["memory_mib"] << 20:
                stopped = "memory"
                break
            continue
        part = os.read(told, 65536)
        if not part:
            stopped = "ended"
            break
        found += part
        *lines, found = found.split(b"\n")
        for message in map(json.loads, lines):
            if "entered" in message:
                try:
                    _map_users(child)
                except OSError as error:
                    return {"broken": str(error)}
                os.write(go, b"1")
            elif "broken" in message:
                return {"broken": str(message["broken"])}
            elif "done" in message:
                return {"verdicts": verdicts, "forged": bool(message["done"])}
            else:
                verdicts.append(message)
    if not verdicts and stopped == "ended":
        return {"broken": "the sandbox ended before its first test"}
    rest = [{"passed": False, "why": stopped, "said": ""} for _ in job["tests"][len(verdicts) :]]
    return {"verdicts": verdicts + rest, "forged": False}


def _memory(child: int) -> int:
    """Bytes of memory that processes below this one hold for themselves."""
    total, waiting = 0, [child]
    while waiting:
        process = waiting.pop()
        try:
            with open(f"/proc/{process}/task/{process}/children") as file:
                waiting += map(int, file.read().split())
            with open(f"/proc/{process}/statm") as file:
                fields = file.read().split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
        total += (int(fields[1]) - int(fields[2])) * resource.getpagesize()
    return total


def _map_users(child: int) -> None:
    """Say who the user inside is outside."""
    user, group = (NOBODY, NOBODY) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    for name, text in (("setgroups", "deny"), ("uid_map", f"{INSIDE} {user} 1"), ("gid_map", f"{INSIDE} {group} 1")):
        _write(f"/proc/{child}/{name}", text)


def _write(path: str, text: str) -> None:
    """Write to a file of the kernel's; raises OSError that names it."""
    descriptor = _named(path, os.open, path, os.O_WRONLY)
    try:
        _named(path, os.write, descriptor, text.encode())
    finally:
        os.close(descriptor)


def _named(what: str, call: Callable[..., Any], *arguments: Any) -> Any:
    """Call, and say of what fails what it was."""
    try:
        return call(*arguments)
    except OSError as error:
        raise OSError(error.errno, f"{what}: {os.strerror(error.errno or 0)}") from None


def _enter(job: dict[str, Any], mount_point: str, told: int, go: int) -> NoReturn:
    """Make the namespaces and wait for process 1 in them."""
    try:
        kernel.prctl("parent's death", kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
        nothing = os.open("/dev/null", os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(nothing, descriptor)
        _write("/proc/self/oom_score_adj", "1000")  # where memory runs out, this goes first
        if os.geteuid() == 0:
            _named("giving up root's groups", os.setgroups, [])
        kernel.landlock_version()
        kernel.unshare(kernel.NAMESPACES)
        _say(told, {"entered": True})
        if os.read(go, 1) != b"1":
            os._exit(1)
        first = os.fork()
        if first == 0:
            _first(job, mount_point, told)
        os.close(told)
        os.waitpid(first, 0)
    except BaseException as error:
        _say(told, {"broken": f"{type(error).__name__}: {error}"})
    os._exit(0)


def _say(told: int, message: dict[str, Any]) -> None:
    os.write(told, json.dumps(message).encode() + b"\n")


def _first(job: dict[str, Any], mount_point: str, told: int) -> NoReturn:
    """Process 1: lay out the files, become nobody, run one test after the other."""
    try:
        _lay_out(mount_point, job["disk_mib"])
        kernel.drop_capabilities()
        kernel.prctl("parent's death", kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
        kernel.prctl("dumpable", kernel.PR_SET_DUMPABLE, 0)
        canary = ""
        for test in job["tests"]:
            verdict = _run(job, test, told)
            canary = canary or (test if verdict["passed"] else "")
            _say(told, verdict)
        # What passes a test that cannot pass has not passed the others either.
        _say(told, {"done": bool(canary) and _run(job, canary + CANARY, told)["passed"]})
    except BaseException as error:
        _say(told, {"broken": f"{type(error).__name__}: {error}"})
    os._exit(0)


def _lay_out(mount_point: str, disk_mib: int) -> None:
    """A root of Python's standard library and the system's libraries, read-only, and an empty /tmp in memory.

    Folders are opened as who the trainer is, who may pass through them, and made as the user inside.
    """
    own = f"uid={INSIDE},gid={INSIDE}"
    kernel.mount("none", "/", flags=kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.mount("sandbox", mount_point, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, f"size=1m,mode=755,{own}")
    os.chdir(mount_point)
    links: dict[str, str] = {}
    opened: dict[str, int] = {}
    for path in ("/usr/lib", "/usr/lib64", "/lib", "/lib64", f"{sys.base_prefix}/lib"):
        if os.path.islink(path):
            links[path] = os.readlink(path)
        elif os.path.isdir(path) and not any(path.startswith(f"{known}/") for known in opened):
            opened[path] = os.open(path, os.O_PATH)
    os.setresgid(INSIDE, INSIDE, INSIDE)
    os.setresuid(INSIDE, INSIDE, INSIDE)
    for path, folder in opened.items():
        os.makedirs(f".{path}")
        kernel.mount(f"/proc/self/fd/{folder}", f".{path}", flags=kernel.MS_BIND | kernel.MS_REC)
        kernel.make_read_only(f".{path}", recursive=True)
        os.close(folder)
    for path, goal in links.items():
        os.symlink(goal, f".{path}")
    os.mkdir("dev")
    for device in ("/dev/null", "/dev/zero", "/dev/urandom"):
        os.close(os.open(f".{device}", os.O_CREAT | os.O_WRONLY))
        kernel.mount(device, f".{device}", flags=kernel.MS_BIND)
    os.mkdir("tmp")
    flags = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
    kernel.mount("sandbox", "tmp", "tmpfs", flags, f"size={disk_mib}m,nr_inodes=4096,mode=755,{own}")
    kernel.make_read_only(".", recursive=False)
    kernel.change_root()


def _run(job: dict[str, Any], test: str, told: int) -> dict[str, Any]:
    """One test in one process, until it ends or its time is over; whatever it leaves behind is killed."""
    token = secrets.token_bytes(16)
    verdict_out, verdict_in = os.pipe()
    said_out, said_in = os.pipe()
    child = os.fork()
    if child == 0:
        _attempt(job, test, token, verdict_in, said_in)
    os.close(verdict_in)
    os.close(said_in)
    said, why = _follow(child, said_out, time.monotonic() + job["wall_s"], job["output_bytes"])
    os.kill(-1, signal.SIGKILL)  # everything inside but this process
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            break
    os.set_blocking(verdict_out, False)
    try:
        passed = why == "" and os.read(verdict_out, 64) == token
    except BlockingIOError:
        passed = False
    os.close(verdict_out)
    os.close(said_out)
    return {"passed": passed, "why": "" if passed else why or "failed", "said": said.decode(errors="replace")}


def _follow(child: int, said_out: int, ends_at: float, most: int) -> tuple[bytes, str]:
    """The first bytes of what a process says, and why it was ended; empty: it ended by itself."""
    ended, said = os.pidfd_open(child), b""
    try:
        while (left := ends_at - time.monotonic()) > 0:
            ready, _, _ = select.select([ended, said_out], [], [], left)
            if said_out in ready and (part := os.read(said_out, 65536)):
                said += part[: most - len(said)]
            elif ended in ready:
                return said, ""
            elif said_out in ready:  # it has closed its output
                select.select([ended], [], [], max(0.0, ends_at - time.monotonic()))
        return said, "wall"
    finally:
        os.close(ended)


def _attempt(job: dict[str, Any], test: str, token: bytes, verdict: int, said: int) -> NoReturn:
    """Give up every right, then run the code and its test; the token is written where both came to their end."""
    status = 1
    try:
        os.dup2(said, 1)
        os.dup2(said, 2)
        os.closerange(3, verdict)
        os.closerange(verdict + 1, OPEN_FILES * 16)
        os.chdir("/tmp")
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
        sys.argv, sys.path[:] = ["solution"], [path for path in sys.path if path.startswith(f"{sys.base_prefix}/lib")]
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        _restrict(job)
        space: dict[str, Any] = {"__name__": "solution"}
        exec(compile(job["code"], "solution.py", "exec"), space)
        exec(compile(test, "test.py", "exec"), space)
        os.write(verdict, token)
        status = 0
    except BaseException:
        traceback.print_exc(limit=-4)
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)


def _restrict(job: dict[str, Any]) -> None:
    """Limits, Landlock and the filter of system calls: none of them can be lifted again."""
    memory, disk = job["memory_mib"] << 20, job["disk_mib"] << 20
    limits = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_CPU: job["cpu_s"],
        resource.RLIMIT_NPROC: job["processes"],
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_FSIZE: disk,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for limit, most in limits.items():
        resource.setrlimit(limit, (most, most))
    rules = [("/", kernel.READ_FILES), ("/tmp", kernel.CHANGE_FILES), ("/dev", kernel.READ_FILES | kernel.WRITE_FILES)]
    kernel.restrict_files(rules)
    kernel.filter_system_calls()
