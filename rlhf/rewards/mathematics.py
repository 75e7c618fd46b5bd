"""math-verify in a separate process: its limits are signals, which need a main thread, and sympy can hang."""

import importlib.util
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Sequence

from recipes.errors import Finding, RequestError, StageError
from recipes.problem_codes import Code
from recipes.stages.rewards.answers import MathVerify
from recipes.stages.rewards.term import Row

LIMIT_S = 5
"""Of parsing and of comparing one answer; what takes longer is wrong."""
HARD_LIMIT_S = 60.0
"""Of one answer, its process's start included: then the process is replaced and the answer is wrong."""

_CHILD = f"""
import json, sys
from math_verify import parse, verify
for line in sys.stdin:
    gold, text = json.loads(line)
    gold = gold if "$" in gold or chr(92) in gold else "$" + gold + "$"
    golds, found = parse(gold, parsing_timeout={LIMIT_S}), parse(text, parsing_timeout={LIMIT_S})
    print(json.dumps(bool(golds and found) and verify(golds, found, timeout_seconds={LIMIT_S})), flush=True)
"""


def math_finding() -> Finding | None:
    """Why math-verify cannot be asked here; None: it can."""
    if importlib.util.find_spec("math_verify") is not None:
        return None
    return Finding(Code.MISSING_PACKAGE, "the package math-verify is not installed", "pip install 'trainwright[math]'")


class MathProcess:
    """Answers whether responses equal the true answers; the process starts with the first question."""

    def __init__(self, term: MathVerify) -> None:
        if (finding := math_finding()) is not None:
            raise RequestError.of(finding)
        self._term = term
        self._process: subprocess.Popen[bytes] | None = None

    def values(self, texts: Sequence[str], rows: Sequence[Row]) -> list[float]:
        """1 where a response equals its row's answer, else 0."""
        return [self._value(text, self._term.answer(row)) for text, row in zip(texts, rows, strict=True)]

    def close(self) -> None:
        """End the process, which otherwise ends with this one."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _value(self, text: str, answer: str) -> float:
        process = self._process
        if process is None or process.poll() is not None:
            process = self._process = subprocess.Popen(
                [sys.executable, "-c", _CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps([answer, text]).encode() + b"\n")
        process.stdin.flush()
        line = _line(process, HARD_LIMIT_S)
        if line is None:
            self.close()
            return 0.0
        if not line:
            raise StageError(f"math-verify's process ended with status {process.wait()}")
        return float(json.loads(line))


def _line(process: "subprocess.Popen[bytes]", limit_s: float) -> bytes | None:
    """The next line of a process, empty where it has ended; None: there was none in time."""
    assert process.stdout is not None
    ends_at, found = time.monotonic() + limit_s, b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while not found.endswith(b"\n"):
            if not selector.select(max(0.0, ends_at - time.monotonic())):
                return None
            part = os.read(process.stdout.fileno(), 65536)
            if not part:
                return b""
            found += part
    return found
