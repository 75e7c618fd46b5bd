"""The quickstart in its smoke size, run once as a user runs it, for all tests here."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).resolve().parents[2]
QUICKSTART = PROJECT / "recipes" / "quickstart.yaml"


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
    """Calls trainwright in processes of its own, from a folder that is not the project's."""

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


@pytest.fixture(scope="session")
def quickstart() -> Path:
    """The shipped recipe."""
    return QUICKSTART


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory: pytest.TempPathFactory) -> SmokeRun:
    """The whole chain on an embedded Ray with two workers."""
    folder = tmp_path_factory.mktemp("e2e")
    shell = Shell(folder, folder / "store")
    done = shell("run", str(QUICKSTART), "--smoke", "--set", "cluster.workers=2", "--set", "cluster.gpus_per_worker=0")
    assert done.code == 0, done.out + done.err
    (run,) = [item["run"] for item in shell("status", "--json").json]
    digests = {item["stage"]: item["digest"] for item in shell("store", "ls", "--json").json}
    return SmokeRun(shell, done, run, digests)


@pytest.fixture
def make_shell(tmp_path: Path) -> Callable[..., Shell]:
    """A shell on an empty store of its own."""
    return lambda **environment: Shell(tmp_path, tmp_path / "store", **environment)
