"""A disk that cannot give a file or a folder, at any read of a store's life: refused by name, and nothing is lost."""

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recipes.errors import TrainwrightError
from trainers.store import local_files
from trainers.store.store import Store

sys.path.insert(0, str(Path(__file__).parent))
from life import live

sys.path.pop(0)

SHORT_POINTS = 15


class Reads:
    """Opening files for reading, listing folders, looking at files: the n-th of these calls fails."""

    def __init__(self, fail_at: int, error: int) -> None:
        self.count = 0
        self._fail_at = fail_at
        self._error = error
        self._open = Path.open

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def listdir(self, path: Any) -> Any:
        return self._call(os.listdir, path)

    def stat(self, path: Any) -> Any:
        return self._call(os.stat, path)

    def open_path(self, path: Path, *arguments: Any, **options: Any) -> Any:
        return self._call(self._open, path, *arguments, **options)

    def _call(self, real: Callable[..., Any], path: Any, *arguments: Any, **options: Any) -> Any:
        self.count += 1
        if self.count == self._fail_at:
            raise OSError(self._error, os.strerror(self._error), str(path))
        return real(path, *arguments, **options)


def live_with(root: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, list[int]], str | None]:
    """Live a life; returns what was acknowledged, and the error that ended it."""
    said: dict[str, list[int]] = {}
    with monkeypatch.context() as patch:
        patch.setattr(local_files, "os", reads)
        patch.setattr(Path, "open", lambda self, *arguments, **options: reads.open_path(self, *arguments, **options))
        try:
            live(Store.open(str(root)), lambda what, value: said.setdefault(what, []).append(value))
        except TrainwrightError as error:
            return said, str(error)
    return said, None


def check(root: Path, said: dict[str, list[int]]) -> None:
    store = Store.open(str(root))
    report = store.verify()
    assert (report.damage, report.aside) == ([], [])
    latest = store.latest_state("run", "base")
    assert (0 if latest is None else latest.step) >= max(said.get("state", [0]))
    assert len(list(store.run("run").read_lines("journal"))) >= len(said.get("line", []))
    assert store.states("run", "base").highest_lease() >= max(said.get("lease", [0]))


@pytest.mark.parametrize(
    ("error", "most"),
    [(errno.EIO, SHORT_POINTS), *(pytest.param(e, None, marks=pytest.mark.long) for e in (errno.EIO, errno.ESTALE))],
)
def test_a_read_that_fails_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, say: Callable[[str], None], error: int, most: int | None
) -> None:
    whole = Reads(0, error)
    said, problem = live_with(tmp_path / "whole", whole, monkeypatch)
    assert problem is None
    assert "done" in said
    points = range(1, whole.count + 1)
    chosen = points if most is None else points[:: -(-len(points) // most)]
    refused = 0
    for number in chosen:
        root = tmp_path / f"store-{number}"
        said, problem = live_with(root, Reads(number, error), monkeypatch)
        if problem is not None:
            refused += 1
            assert os.strerror(error) in problem
            assert str(root) in problem or "objects/" in problem or "refs/" in problem
        check(root, said)
    say(f"{os.strerror(error)}: {len(chosen)} of {len(points)} reads, {refused} refused: ACK-LOSS 0")
    assert len(points) > 100
    assert refused > len(chosen) // 2
