"""Writers that can be killed, traced and frozen, and what they acknowledged."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[2]


@dataclass
class Child:
    """A process that the nursery forked, and its files."""

    pid: int
    nursery: int
    number: int
    acks: Path
    errors: Path
    go: Path

    def acknowledged(self) -> list[list[str]]:
        """Every whole line that it wrote."""
        text = self.acks.read_text() if self.acks.exists() else ""
        return [line.split() for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def is_alive(self) -> bool:
        """Whether it still runs; the nursery reaps at once, and its number may be another process's by now."""
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return False
        return int(stat.rpartition(")")[2].split()[1]) == self.nursery

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        if self.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self.wait(30)

    def wait(self, seconds: float) -> None:
        """Wait until it is gone."""
        wait_until(lambda: not self.is_alive(), seconds)

    def wait_acknowledged(self, count: int) -> None:
        """Wait until it has acknowledged that much."""
        wait_until(lambda: len(self.acknowledged()) >= count or not self.is_alive(), 120)
        assert self.is_alive(), self.errors.read_text() if self.errors.exists() else "it died"


def wait_until(found: Callable[[], bool], seconds: float) -> None:
    """Poll until something is so."""
    deadline = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < deadline, f"nothing happened in {seconds:.0f} s"
        time.sleep(0.002)


class Nursery:
    """Starts children; see nursery.py."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self.children: list[Child] = []
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "nursery.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}"},
        )  # fmt: skip

    def start(self, do: str, store: Path, *, number: int = 0, seed: int = 0, waits: bool = False, **more: Any) -> Child:
        """Fork a child that begins at once; with `waits` its own files are open, and it begins when `go` is made."""
        self._count += 1
        names = {name: self._folder / f"{name}-{self._count}" for name in ("acks", "errors", "go")}
        order = {"do": do, "store": str(store), "number": number, "seed": seed, **more}
        order |= {name: str(path) for name, path in names.items() if name != "go" or waits}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        child = Child(int(self._process.stdout.readline()), self._process.pid, number, **names)
        self.children.append(child)
        if waits:
            wait_until(child.acks.exists, 60)
        return child

    def close(self) -> None:
        """End every child that is still there, and the nursery."""
        for child in self.children:
            child.kill()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()
