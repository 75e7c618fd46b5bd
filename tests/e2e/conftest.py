"""The quickstart in its smoke size, run once as a user runs it, for all tests here."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.shell import PROJECT, Shell, SmokeRun

QUICKSTART = PROJECT / "recipes" / "quickstart.yaml"


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
