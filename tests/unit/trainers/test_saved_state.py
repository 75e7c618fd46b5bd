"""Finding a state together: what one rank cannot read, every rank steps over, and none waits for one that gave up."""

import errno
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recipes.errors import StageError, StoreDamaged
from trainers.checkpoint import find_state as saved_state
from trainers.checkpoint.find_state import find_state
from trainers.store import place as files
from trainers.store.manifest import FORMAT, StateManifest, canonical_json
from trainers.store.store import Store

sys.path.insert(0, str(Path(__file__).parents[2] / "faults" / "store"))
from life import state

sys.path.pop(0)


class Threads:
    """Ranks as threads of one process: the few collectives that are used here, with a deadline."""

    def __init__(self, count: int) -> None:
        self._barrier = threading.Barrier(count, timeout=30)
        self._here = threading.local()
        self._values: dict[int, Any] = {}
        self._count = count

    def rank(self) -> int:
        return int(self._here.rank)

    def gather_json(self, value: Any) -> list[Any]:
        self._values[self.rank()] = value
        self._barrier.wait()
        found = [self._values[rank] for rank in range(self._count)]
        self._barrier.wait()
        return found

    def broadcast_json(self, value: Any) -> Any:
        return self.gather_json(value)[0]

    def run(self, work: Callable[[int], object]) -> list[object]:
        """Return what each rank returned or raised."""
        ended: dict[int, object] = {}

        def one(rank: int) -> None:
            self._here.rank = rank
            try:
                ended[rank] = work(rank)
            except Exception as error:
                ended[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self._count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [ended[rank] for rank in range(self._count)]


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Threads:
    made = Threads(2)
    monkeypatch.setattr(saved_state, "distributed", made)
    return made


@pytest.fixture
def made(tmp_path: Path) -> tuple[list[Store], list[StateManifest]]:
    """A store as two ranks have opened it, with the states of two steps."""
    stores = [Store.open(str(tmp_path / "store")) for _ in range(2)]
    lease = stores[0].take_lease("run", "base")
    return stores, [state(stores[0], "run", "base", lease, step, b"%d" % step * 10) for step in (1, 2)]


def find(stores: list[Store], states: list[StateManifest]) -> Callable[[int], object]:
    return lambda rank: find_state(stores[rank], "run", "base", states[0].fingerprint)


@pytest.mark.parametrize("error", [errno.EIO, errno.EUCLEAN, errno.ESTALE])
def test_what_one_rank_cannot_read_no_rank_goes_on_from(
    ranks: Threads, made: tuple[list[Store], list[StateManifest]], monkeypatch: pytest.MonkeyPatch, error: int,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    stores, states = made
    bad, real = next(states[1].objects()).sha256[2:], files.file_chunks

    def chunks(path: Path) -> Any:
        if path.name == bad:
            raise OSError(error, os.strerror(error), str(path))
        return real(path)

    monkeypatch.setattr(files, "file_chunks", chunks)
    assert ranks.run(find(stores, states)) == [states[0], states[0]]
    assert f"{bad} cannot be read: {os.strerror(error)}" in caplog.text


def test_an_error_of_one_rank_that_is_no_damage_ends_the_search_on_all(
    ranks: Threads, made: tuple[list[Store], list[StateManifest]], monkeypatch: pytest.MonkeyPatch
) -> None:
    stores, states = made

    def fail(hashes: object, threads: int) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(stores[1].objects, "verify_all", fail)
    for ended in ranks.run(find(stores, states)):
        assert isinstance(ended, StageError)
        assert "rank 1: PermissionError: [Errno 13] Permission denied" in str(ended)
    monkeypatch.undo()
    assert not (Path(stores[0].uri) / "quarantine").exists()


def test_what_rank_0_refuses_all_ranks_refuse(ranks: Threads, made: tuple[list[Store], list[StateManifest]]) -> None:
    stores, states = made
    stores[0].files.create("refs/states/run/base/000004", canonical_json({"format": FORMAT + 1}))
    ended = ranks.run(find(stores, states))
    assert all(f"ref is of format {FORMAT + 1}" in str(error) for error in ended)
    assert not any(isinstance(error, StoreDamaged) for error in ended)
