"""What several suites of unit tests share: how something hostile has to be refused."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

CPU_S = 1.0
WALL_S = 5.0
"""A refusal takes less than a second of work, and does not wait: a busy machine may take longer by the clock."""
EXECUTING = (
    "pickle.find_class",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "socket.connect",
)
"""Audit events of what no refusal does."""

Errors = type[Exception] | tuple[type[Exception], ...]
Refused = Callable[..., AbstractContextManager[pytest.ExceptionInfo[Exception]]]


class Watch:
    """What this process executes while a hostile thing is refused; Python's audit hooks cannot be taken away again."""

    def __init__(self) -> None:
        self.seen: list[str] | None = None
        self.folder = ""
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.seen is None:
            return
        if event in EXECUTING:
            self.seen.append(f"{event} {arguments}")
        elif event == "exec" and str(getattr(arguments[0], "co_filename", "")).startswith(self.folder):
            self.seen.append(f"runs {arguments[0].co_filename}")


@pytest.fixture(scope="session")
def _watch() -> Watch:
    return Watch()


@pytest.fixture
def refused(_watch: Watch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Refused:
    """`with refused(errors, match, named):` demands an error that names `named`, in time, and nothing executed.

    What a payload does is `touch canary`, in the working folder, which is empty before and after. Tests that use it are
    marked hostile: `pytest -m hostile --collect-only -q` counts them.
    """
    place = tmp_path / "working folder"
    place.mkdir()
    monkeypatch.chdir(place)

    @contextmanager
    def block(errors: Errors, match: str | None, named: object) -> Iterator[pytest.ExceptionInfo[Exception]]:
        seen: list[str] = []
        _watch.seen, _watch.folder = seen, str(tmp_path)
        began_at, cpu_at = time.perf_counter(), time.process_time()
        try:
            with pytest.raises(errors, match=match) as refusal:
                yield refusal
        finally:
            _watch.seen = None
        assert seen == []
        assert list(place.iterdir()) == []
        assert time.process_time() - cpu_at < CPU_S
        assert time.perf_counter() - began_at < WALL_S
        assert str(named) in str(refusal.value)

    return block


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what shows that something hostile is refused."""
    for item in items:
        if "refused" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.hostile)
