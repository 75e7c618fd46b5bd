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
from trainers.store.collection import collect
from trainers.store.inspection import verify
from trainers.store.place import ADVICE
from trainers.store.store import Store

sys.path.insert(0, str(Path(__file__).parent))
from life import artifact, live, state

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
    report = verify(store)
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


class Refusing:
    """The os module, of which one call answers with an error."""

    def __init__(self, call: str, error: int) -> None:
        self.refused = 0
        self._call = call
        self._error = error

    def __getattr__(self, name: str) -> Any:
        return self.refuse if name == self._call else getattr(os, name)

    def refuse(self, *arguments: Any, **options: Any) -> Any:
        self.refused += 1
        raise OSError(self._error, os.strerror(self._error), str(arguments[0]))


CALLS: dict[str, Callable[[Store], Any]] = {
    "list": Store.list_artifacts,
    "names": Store.names,
    "pins": Store.pins,
    "runs": Store.runs,
    "verify": verify,
    "latest": lambda store: store.latest_state("run", "base"),
    "keep": lambda store: store.keep_states("run", "base"),
    "lease": lambda store: store.take_lease("new", "base"),
    "artifact": lambda store: artifact(store, "ef" * 32),
    "state": lambda store: state(store, "run", "base", 1, 9, b"content"),
    "run": lambda store: store.new_run("recipe"),
    "probe": Store.probe_writable,
    "room": Store.free_bytes,
    "collect": lambda store: collect(store, grace_s=0),
    "folder": lambda store: store.folder(store.resolve("ab" * 32)),
}


TELLING = ("list", "names", "pins", "verify", "keep")
"""These report or warn of what is damaged, and go on."""


def refusal_of(do: Callable[[], Any]) -> str | None:
    """What a call is refused with."""
    try:
        do()
    except TrainwrightError as refusal:
        return str(refusal)
    return None


@pytest.mark.parametrize("error", [errno.EACCES, errno.ENOSPC, errno.EIO, errno.EMFILE], ids=os.strerror)
@pytest.mark.parametrize("call", ["listdir", "mkdir", "stat", "statvfs", "is_dir"])
def test_every_call_of_a_store_says_path_and_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: int
) -> None:
    """Listing, making and looking at folders: no bare error of the system leaves the store."""
    root = tmp_path / "store"
    made = Store.open(str(root))
    artifact(made, "ab" * 32)
    lease = made.take_lease("run", "base")
    for step in (1, 2, 3):
        state(made, "run", "base", lease, step, b"content")
    said: list[str] = []
    for name, do in CALLS.items():
        store, refusing = Store.open(str(root)), Refusing(call, error)
        with monkeypatch.context() as patch:
            patch.setattr(local_files, "os", refusing)
            if call in ("mkdir", "is_dir"):
                patch.setattr(Path, call, lambda path, *_, refuse=refusing.refuse, **__: refuse(path))
            problem = refusal_of(lambda store=store, do=do: do(store))  # type: ignore[misc]
        if problem is None:
            assert not refusing.refused or name in TELLING, name
            continue
        said.append(problem)
        assert str(root) in problem, f"{name}: {problem}"
        assert os.strerror(error) in problem
        is_full = error == errno.ENOSPC and "bytes)" in problem  # of writes: needed and free
        assert is_full or ADVICE[error] in problem, f"{name}: {problem}"
    assert said, f"nothing calls {call}"
