"""One suite for every kind of place that a store can lie in: files and objects; a kind counts when it passes all."""

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from recipes.errors import CapacityError, RequestError, StoreDamaged
from tests.contract.store import places as things
from tests.contract.store.places import S3Server
from trainers.store import local_files
from trainers.store.inspection import verify
from trainers.store.manifest import FileEntry, sha256_hex
from trainers.store.objects import object_path
from trainers.store.store import Store


def test_create_only(store: Store) -> None:
    files = store._files
    assert files.create("refs/x/000001", b"one")
    assert not files.create("refs/x/000001", b"two")
    assert files.read("refs/x/000001") == b"one"
    assert files.names("refs/x") == ["000001"]
    assert files.names("refs/none") == []
    assert files.size("refs/x/000001") == 3
    assert files.size("refs/x") is None
    assert files.read_range("refs/x/000001", 1, 9) == b"ne"
    files.remove("refs/x/000001")
    files.remove("refs/x/000001")
    assert files.size("refs/x/000001") is None
    with pytest.raises(FileNotFoundError):
        files.read("refs/x/000001")


@pytest.mark.parametrize("kind", [list, iter])
def test_an_object_is_named_by_what_was_written(store: Store, kind: Callable[[Any], Any]) -> None:
    """Buffers in memory are hashed beside the writing, a stream on its way: the same name, the same bytes."""
    buffers = [b"a", memoryview(bytes(range(256)) * 8192), bytearray(3 << 20), b""]
    whole = b"".join(buffers)
    written = store.objects.put_chunks(kind(buffers), len(whole))
    assert written == FileEntry(sha256=sha256_hex(whole), bytes=len(whole))
    assert store.objects.get_bytes(written.sha256) == whole


def test_racing_creators_have_one_winner(open_store: Callable[[], Store]) -> None:
    stores = [open_store() for _ in range(8)]
    for round_number in range(5):
        barrier = threading.Barrier(len(stores))
        won: list[int] = []

        def race(
            index: int, round_number: int = round_number, barrier: threading.Barrier = barrier, won: list[int] = won
        ) -> None:
            barrier.wait()
            if stores[index]._files.create(f"refs/race/{round_number:06d}", b"%d" % index):
                won.append(index)

        threads = [threading.Thread(target=race, args=(index,)) for index in range(len(stores))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert stores[0]._files.read(f"refs/race/{round_number:06d}") == b"%d" % won[0]


def test_an_answer_that_got_lost_is_no_lost_race(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The write arrived, its answer did not: what is there decides."""
    store = Store.open(s3_uri)
    remote = store._files._fs  # type: ignore[attr-defined]
    real = remote.pipe_file

    def arrives(*args: object, **options: object) -> None:
        real(*args, **options)
        raise OSError("connection reset")

    monkeypatch.setattr(remote, "pipe_file", arrives)
    assert store._files.create("refs/x/000001", b"one")
    assert not store._files.create("refs/x/000001", b"two")
    monkeypatch.undo()
    assert store._files.read("refs/x/000001") == b"one"


@pytest.mark.parametrize("lost", ["link", "unlink"])
def test_a_folders_answer_that_got_lost_is_no_lost_race(
    nfs_uri: str, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """The first answers are lost: a run id is taken once, a line written once, another's name stays another's."""
    losses = iter([True] * 5)
    monkeypatch.setattr(local_files.os, "_is_lost", lambda call: call == lost and next(losses, False))
    store = Store.open(nfs_uri)
    run = store.new_run("recipe")
    assert store.runs() == [run.id]
    writer = run.writer("journal")
    writer.append({"n": 1})
    writer.flush()
    assert list(run.read_lines("journal")) == [{"n": 1}]
    assert store.files.create("refs/x/000001", b"one")
    assert not store.files.create("refs/x/000001", b"two")
    assert store.files.read("refs/x/000001") == b"one"
    assert [store.take_lease("run", "base") for _ in range(2)] == [1, 2]
    assert store.objects.put_bytes(b"x") == store.objects.put_bytes(b"x")
    assert list(store.files.walk("tmp")) == []


def test_an_upload_that_is_altered_on_the_way_is_not_acknowledged(
    s3_server: S3Server, s3_uri: str, tmp_path: Path
) -> None:
    """Of the same size, and accepted by the server."""
    store = Store.open(s3_uri)
    source = tmp_path / "model.safetensors"
    source.write_bytes(b"weights")
    s3_server.fault = lambda method, path, query: "altered" if method == "PUT" else None
    with pytest.raises(CapacityError, match=r"objects/.* altered"):
        store.objects.put_file(source)
    s3_server.fault = lambda method, path, query: None
    assert verify(store).damage == []
    entry = store.objects.put_file(source)
    assert Store.open(s3_uri).objects.local_path(entry.sha256).read_bytes() == source.read_bytes()


def test_an_upload_is_read_back_once(s3_server: S3Server, s3_uri: str) -> None:
    store = Store.open(s3_uri)
    asked: list[str] = []
    s3_server.fault = lambda method, path, query: asked.append("list" if "list-type" in query else method)
    store.objects.put_bytes(b"weights")
    assert (asked.count("PUT"), asked.count("GET")) == (1, 1)
    asked.clear()
    store.objects.put_bytes(b"weights")
    assert (asked.count("PUT"), asked.count("GET")) == (0, 1), "young, so it is not written again"


def test_an_altered_object_is_mended_by_putting_it_again(open_store: Callable[[], Store]) -> None:
    sha = open_store().objects.put_bytes(b"right")
    things.overwrite(open_store(), object_path(sha), b"wrong")
    assert open_store().objects.put_bytes(b"right") == sha
    assert open_store().objects.get_bytes(sha) == b"right"


def test_objects_are_named_by_their_bytes(store: Store, tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    sha = store.objects.put_bytes(data)
    assert sha == sha256_hex(data)
    assert store.objects.put_bytes(data) == sha
    assert store.objects.get_bytes(sha) == data
    assert store.objects.has(sha, len(data))
    assert not store.objects.has(sha, 1)
    assert store.objects.local_path(sha).read_bytes() == data
    source = tmp_path / "file"
    source.write_bytes(data[:100])
    assert store.objects.get_bytes(store.objects.put_file(source).sha256) == data[:100]
    assert store.objects.put_chunks([data[:7], memoryview(data)[7:]]).sha256 == sha
    assert list(store._files.walk("objects")) == sorted(object_path(s) for s in (sha, sha256_hex(data[:100])))


@pytest.mark.parametrize("damage", ["flipped", "short", "empty", "missing"])
def test_a_damaged_object_is_never_read(open_store: Callable[[], Store], damage: str) -> None:
    data = os.urandom(1000)
    sha = open_store().objects.put_bytes(data)
    altered = {"flipped": bytes([data[0] ^ 1]) + data[1:], "short": data[:-1], "empty": b"", "missing": None}[damage]
    things.overwrite(open_store(), object_path(sha), altered)
    store = open_store()
    with pytest.raises(StoreDamaged, match=sha[2:]):
        store.objects.get_bytes(sha)
    with pytest.raises(StoreDamaged, match=sha[2:]):
        store.objects.local_path(sha)


def test_a_failing_source_leaves_nothing(store: Store) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"some"
        raise RuntimeError("source broke")

    with pytest.raises(RuntimeError, match="source broke"):
        store.objects.put_chunks(chunks())
    assert list(store._files.walk("objects")) == []
    assert list(store._files.walk("tmp")) == []


def test_ids_cannot_leave_the_store(store: Store) -> None:
    for run in ("", "..", "../x", "a/b", "a\x00", "/abs"):
        with pytest.raises(RequestError):
            store.run(run)
        with pytest.raises(RequestError):
            store.take_lease(run, "base")
    with pytest.raises(RequestError):
        store.find_artifact("../../etc")
    with pytest.raises(ValueError, match="not a name"):
        store.run("run").write_once("../x", b"")


def test_unknown_places_are_refused() -> None:
    with pytest.raises(RequestError, match="ftp:// is not supported"):
        Store.open("ftp://host/x")
    with pytest.raises(RequestError, match="not a folder"):
        Store.open("")


def test_an_unreachable_place_is_named(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    store = Store.open(str(blocked / "store"))
    with pytest.raises(CapacityError, match="file/store: cannot write tmp/probe"):
        store.probe_writable()
    assert store.list_artifacts() == []
