"""Tests of code that nobody has read, run in sandboxes; the code never runs outside of one.

`box.py` is what a sandbox is made of, run by a fresh interpreter: a trainer with threads and weights is not forked.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from recipes.errors import Finding, StageError
from recipes.problem_codes import Code
from recipes.stages.rewards.unit_tests import Attempt, SandboxLimits, Tested

_ROOT = Path(__file__).resolve().parents[2]
_PROGRAM = f"import sys; sys.path.append({str(_ROOT)!r}); from rlhf.sandbox.box import serve; serve()"
_OLDEST = (5, 14)
"""Kernel whose limit of processes counts those of a user namespace alone."""
_PROBE = """
import os, socket
def refused(what, *arguments):
    try:
        what(*arguments)
    except (OSError, MemoryError):
        return True
assert refused(socket.socket), "it may open a socket"
assert refused(open, "/etc/passwd"), "it may read /etc/passwd"
assert refused(open, "/usr/lib/x", "w"), "it may write to /usr/lib"
assert refused(bytearray, 128 << 20), "it may use more memory than it is given"
children = []
def fork():
    if (child := os.fork()) == 0:
        os.read(held, 1)
        os._exit(0)
    children.append(child)
def fork_often():
    for _ in range(16):
        fork()
held, _held_open = os.pipe()
assert refused(fork_often), "it may start more processes than it is given"
assert len(children) >= 2, "it may not start a process"
"""


def run_tests(attempts: Sequence[Attempt], limits: SandboxLimits, parallel: int = 1) -> list[Tested]:
    """Run the tests of every attempt; raises StageError where a sandbox cannot be set up."""
    parts = [list(attempts[first::parallel]) for first in range(min(parallel, len(attempts)))]
    with ThreadPoolExecutor(max(len(parts), 1)) as pool:
        done = list(pool.map(lambda part: _run(part, limits), parts))
    return [done[place % len(parts)][place // len(parts)] for place in range(len(attempts))]


@cache
def sandbox_finding() -> Finding | None:
    """What this machine lacks for a sandbox, found by trying to break out of one; None: nothing."""
    advice = (
        f"Linux {'.'.join(map(str, _OLDEST))} or newer with user namespaces, Landlock and seccomp, also in a container"
    )
    if sys.platform != "linux":
        return Finding(Code.NO_SANDBOX, f"code cannot be run in a sandbox on {sys.platform}", advice)
    release = os.uname().release
    if tuple(map(int, release.split("-")[0].split(".")[:2])) < _OLDEST:
        return Finding(Code.NO_SANDBOX, f"code cannot be run in a sandbox by Linux {release}", advice)
    limits = SandboxLimits(memory_mib=96, processes=8, wall_s=20, cpu_s=20)
    try:
        (found,) = run_tests([Attempt("", (_PROBE,))], limits)
    except StageError as error:
        return Finding(Code.NO_SANDBOX, str(error), advice)
    if all(found.passed):
        return None
    return Finding(Code.NO_SANDBOX, f"the sandbox does not hold: {found.said[0][-200:] or found.why[0]}", advice)


def _run(attempts: Sequence[Attempt], limits: SandboxLimits) -> list[Tested]:
    """The same one after the other, by one interpreter."""
    jobs = [{"code": each.code, "tests": each.tests, **limits.model_dump()} for each in attempts]
    lines = b"".join(json.dumps(job).encode() + b"\n" for job in jobs)
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    command = [sys.executable, "-I", "-S", "-X", "utf8", "-c", _PROGRAM]
    process = subprocess.run(command, input=lines, capture_output=True, env=kept, cwd="/", check=False)
    answers = [json.loads(line) for line in process.stdout.splitlines()]
    for answer in answers:
        if "broken" in answer:
            raise StageError(f"no sandbox can be set up here: {answer['broken']}")
    if len(answers) != len(jobs):
        raise StageError(f"the sandbox's program ended with status {process.returncode}: {process.stderr[-500:]!r}")
    return [_tested(answer) for answer in answers]


def _tested(answer: dict[str, Any]) -> Tested:
    verdicts, forged = answer["verdicts"], answer["forged"]
    return Tested(
        tuple(each["passed"] and not forged for each in verdicts),
        tuple(each["why"] for each in verdicts),
        tuple(each["said"] for each in verdicts),
        forged,
    )
