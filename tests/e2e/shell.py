"""Commands of trainwright, called as a user calls them, in processes of their own."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Done:
    """A command that ended."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def json(self) -> Any:
        """Its standard output, parsed."""
        return json.loads(self.out)


class Shell:
    """Calls trainwright in separate processes, from a folder outside the project."""

    def __init__(self, folder: Path, store: Path, **environment: str) -> None:
        self.folder = folder
        self.store = store
        self._environment = {**os.environ, "TRAINWRIGHT_STORE": str(store), "PYTHONPATH": str(PROJECT), **environment}

    def __call__(self, *arguments: str, timeout_s: float = 500.0) -> Done:
        """Run a command to its end."""
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "launch.cli", *arguments],
            env=self._environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        return Done(done.returncode, done.stdout, done.stderr, time.monotonic() - started)


@dataclass(frozen=True)
class SmokeRun:
    """The finished smoke run and its store."""

    shell: Shell
    done: Done
    run: str
    digests: dict[str, str]
