"""Garbage collection on every kind of place: what is needed stays, what nothing needs goes after two passes."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recipes.errors import RequestError, StoreDamaged
from trainers.store import local_files, remote_files
from trainers.store.collection import Keep, collect
from trainers.store.inspection import lineage, verify
from trainers.store.manifest import (
    ArtifactManifest,
    DatasetManifest,
    FileEntry,
    Layout,
    StateManifest,
    files_digest,
    sha256_hex,
)
from trainers.store.objects import object_path
from trainers.store.place import Files
from trainers.store.store import Store

HOUR = 3600.0


def put(store: Store, data: bytes) -> FileEntry:
    return FileEntry(sha256=store.objects.put_bytes(data), bytes=len(data))


def state(store: Store, run: str, lease: int, step: int, fingerprint: str = "ab" * 32) -> StateManifest:
    manifest = StateManifest(
        run=run, stage="base", fingerprint=fingerprint, step=step, lease=lease,
        layout=Layout(workers=1, micro_batch=1, accumulation=1),
    )  # fmt: skip
    store.commit_state(manifest, lease)
    return manifest


def age(store: Store, seconds: float) -> None:
    """Make everything in a local store as old as that."""
    assert store.files.root is not None
    then = time.time() - seconds
    for path in store.files.root.rglob("*"):
        if path.is_file():
            os.utime(path, (then, then))


def sweep(store: Store, **options: object) -> list[object]:
    """Run passes until nothing is left to delete; returns what each did."""
    found = []
    while True:
        found.append(collect(store, grace_s=0, **options))  # type: ignore[arg-type]
        if not (found[-1].waiting_objects or found[-1].waiting_refs):
            return found


def test_only_what_nothing_names_goes(commit_artifact: Any, open_store: Callable[[], Store]) -> None:
    store = open_store()
    base = commit_artifact(store, "base")
    chat = commit_artifact(store, "chat", base)
    lease = store.take_lease("run", "base")
    last = state(store, "run", lease, 1)
    orphan = put(store, b"written and never committed")
    first = collect(open_store(), grace_s=0)
    assert (first.removed_objects, first.waiting_objects, first.waiting_bytes) == (0, 1, 27)
    assert open_store().objects.has(orphan.sha256, orphan.bytes)
    second = collect(open_store(), grace_s=0)
    assert (second.removed_objects, second.removed_bytes, second.waiting_objects) == (1, 27, 0)
    after = open_store()
    assert not after.objects.has(orphan.sha256, orphan.bytes)
    assert after.list_artifacts() == [base, chat]
    assert after.latest_state("run", "base") == last
    assert verify(after).damage == []


def test_what_only_dropped_runs_need_goes_and_lineage_stays(
    commit_artifact: Any, open_store: Callable[[], Store]
) -> None:
    store = open_store()
    base = commit_artifact(store, "base")
    chat = commit_artifact(store, "chat", base)
    pinned_parent = commit_artifact(store, "source")
    pinned = commit_artifact(store, "pinned", pinned_parent)
    named = commit_artifact(store, "named")
    unused = commit_artifact(store, "unused", base)
    store.pin(pinned.fingerprint, "for the paper")
    store.name_artifact("best", named.fingerprint)
    for run in ("old", "kept"):
        state(store, run, store.take_lease(run, "base"), 1)
    keep = Keep({chat.fingerprint}, {"kept"})
    dry = collect(open_store(), grace_s=0, keep=keep, dry_run=True)
    assert [ref.split("/")[2] for ref in dry.waiting_refs if "/artifacts/" in ref] == [unused.fingerprint]
    assert open_store().find_artifact(unused.fingerprint) == unused
    passes = sweep(open_store(), keep=keep)
    assert len(passes) >= 3
    left = open_store()
    assert {item.stage for item in left.list_artifacts()} == {"base", "chat", "source", "pinned", "named"}
    assert left.latest_state("old", "base") is None
    assert left.latest_state("kept", "base") is not None
    assert verify(left).damage == []
    assert lineage(left, pinned.fingerprint).missing == []
    assert not left.objects.has(unused.files["model/a.json"].sha256, unused.files["model/a.json"].bytes)
    # The leases of a dropped run stay: their numbers must never be given twice.
    assert left.take_lease("old", "base") == 2


def test_pins_come_and_go(commit_artifact: Any, open_store: Callable[[], Store]) -> None:
    store = open_store()
    base = commit_artifact(store, "base")
    with pytest.raises(RequestError, match="no artifact"):
        store.pin("cd" * 32)
    assert not store.unpin(base.fingerprint)
    store.pin(base.fingerprint, "why")
    assert open_store().pins() == {base.fingerprint: "why"}
    sweep(open_store(), keep=Keep(set(), set()))
    assert open_store().find_artifact(base.fingerprint) == base
    assert store.unpin(base.fingerprint)
    assert open_store().pins() == {}
    sweep(open_store(), keep=Keep(set(), set()))
    assert open_store().find_artifact(base.fingerprint) is None
    assert list(open_store().files.walk("objects")) == []


def test_states_of_finished_stages_go_on_request(commit_artifact: Any, open_store: Callable[[], Store]) -> None:
    store = open_store()
    base = commit_artifact(store, "base")
    state(store, "run", store.take_lease("run", "base"), 1, base.fingerprint)
    state(store, "other", store.take_lease("other", "base"), 1)
    sweep(open_store())
    assert open_store().latest_state("run", "base") is not None
    sweep(open_store(), finished_states=True)
    assert open_store().latest_state("run", "base") is None
    assert open_store().latest_state("other", "base") is not None


def test_data_sets_go_when_no_kept_run_or_artifact_has_taken_them(
    commit_artifact: Any, open_store: Callable[[], Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store()
    base = commit_artifact(store, "base")
    old, new, nobody = (sha256_hex(text) for text in (b"old", b"new", b"nobody"))

    def put_set(by: Store, digest: str) -> None:
        by.put_dataset(DatasetManifest(digest=digest, files={"rows.npy": put(by, digest.encode())}))

    put_set(store, nobody)
    users = {"first": base.fingerprint, "second": "cd" * 32}
    for (run, fingerprint), digest in zip(users.items(), (old, new), strict=True):
        user = open_store()
        user.note_datasets(run, fingerprint)
        assert user.find_dataset(digest) is None
        put_set(user, digest)
    sweep(open_store())
    assert [open_store().find_dataset(digest) is None for digest in (old, new, nobody)] == [False, False, True]
    sweep(open_store(), keep=Keep({base.fingerprint}, set()))
    assert [open_store().find_dataset(digest) is None for digest in (old, new)] == [False, True]
    # Taken by another run after a pass has found it unneeded, and its ref is just being removed: it comes back.
    keep = Keep(set(), set())
    assert any("datasets" in ref for ref in collect(store, grace_s=0, keep=keep).waiting_refs)
    remove = type(store.files).remove

    def take_first(files: Files, path: str) -> None:
        if path.startswith("refs/datasets"):
            monkeypatch.undo()
            user = open_store()
            user.note_datasets("third", "ef" * 32)
            assert user.find_dataset(old) is not None
        remove(files, path)

    monkeypatch.setattr(type(store.files), "remove", take_first)
    collected = collect(store, grace_s=0, keep=keep)
    assert not any("datasets" in ref for ref in collected.removed_refs)
    assert open_store().find_dataset(old) is not None
    assert verify(open_store()).damage == []


def test_a_damaged_ref_stops_the_collection_until_it_is_set_aside(
    commit_artifact: Any, open_store: Callable[[], Store]
) -> None:
    store = open_store()
    base = commit_artifact(store, "base")
    put(store, b"orphan")
    store.files.create(f"refs/artifacts/{base.fingerprint}/000002", b"not a ref")
    with pytest.raises(StoreDamaged, match=r"000002 is damaged.*verify --quarantine"):
        collect(open_store(), grace_s=0)
    report = verify(open_store(), set_aside=True)
    assert report.aside == [f"refs/artifacts/{base.fingerprint}/000002"]
    assert [item.path for item in report.damage] == report.aside
    again = verify(open_store())
    assert (again.damage, again.aside) == ([], report.aside)
    sweep(open_store())
    assert open_store().find_artifact(base.fingerprint) == base
    assert open_store().files.read(report.aside[0]) == b"not a ref"


def test_objects_of_a_living_lease_stay(open_store: Callable[[], Store]) -> None:
    store = open_store()
    lease = store.take_lease("run", "base")

    def write(lease: int) -> FileEntry:
        header = f'{{"__metadata__":{{"owner":"run/base/{lease}/5"}}}}'.encode()
        return store.objects.put_chunks([len(header).to_bytes(8, "little"), header])

    first = write(lease)
    sweep(open_store())
    assert open_store().objects.has(first.sha256, first.bytes)
    second = write(store.take_lease("run", "base"))
    sweep(open_store())
    assert not open_store().objects.has(first.sha256, first.bytes)
    assert open_store().objects.has(second.sha256, second.bytes)


def test_grace_is_by_the_stores_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The collector's own clock may be wrong by an hour either way."""
    store = Store.open(str(tmp_path / "store"))
    put(store, b"old orphan")
    age(store, 2 * HOUR)
    young = put(store, b"young orphan")
    for skew in (-HOUR, HOUR, 0.0):
        monkeypatch.setattr(time, "time", lambda skew=skew, real=time.time: real() + skew)
        found = collect(store, grace_s=HOUR)
        assert (found.removed_objects, found.waiting_objects) == (0, 1), (
            "a list is not applied before its grace is over"
        )
        monkeypatch.undo()
    age(store, 2 * HOUR)
    store.objects.put_bytes(b"young orphan")
    found = collect(store, grace_s=HOUR)
    assert found.removed_objects == 0, "its age has changed since it was listed"
    assert store.objects.has(young.sha256, young.bytes)


def test_a_writer_that_uses_an_old_object_again_keeps_it(tmp_path: Path) -> None:
    """The writer waits between its objects and its ref, and a whole collection comes in between."""
    store = Store.open(str(tmp_path / "store"))
    old = put(store, b"reused a")
    unused = put(store, b"unused")
    age(store, 3 * HOUR)
    assert collect(store, grace_s=HOUR).waiting_objects == 2
    (lists,) = (tmp_path / "store" / "gc").iterdir()
    then = time.time() - 2 * HOUR
    os.utime(lists, (then, then))
    has_put, may_commit = threading.Event(), threading.Event()
    made: list[ArtifactManifest] = []

    def write() -> None:
        mine = Store.open(str(tmp_path / "store"))
        files = {"model/a": put(mine, b"reused a")}
        has_put.set()
        assert may_commit.wait(60)
        manifest = ArtifactManifest(
            fingerprint="cd" * 32, digest=files_digest(files), kind="model", stage="x", files=files
        )
        made.append(mine.put_artifact(manifest).manifest)

    writer = threading.Thread(target=write)
    writer.start()
    assert has_put.wait(60)
    found = collect(store, grace_s=HOUR)
    may_commit.set()
    writer.join()
    assert found.removed_objects == 1
    assert not store.objects.has(unused.sha256, unused.bytes)
    assert store.objects.get_bytes(old.sha256) == b"reused a"
    assert Store.open(str(tmp_path / "store")).list_artifacts() == made
    assert verify(store).damage == []


def test_a_renewal_in_the_moment_of_deletion_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(str(tmp_path / "store"))
    entry = put(store, b"orphan")
    collect(store, grace_s=0)
    path = object_path(entry.sha256)
    real = os.rename

    def renew_then_rename(source: Path, target: Path) -> None:
        os.utime(source)
        real(source, target)

    monkeypatch.setattr(local_files.os, "rename", renew_then_rename)
    assert collect(store, grace_s=0).removed_objects == 0
    monkeypatch.undo()
    assert store.files.read(path) == b"orphan"
    assert list(store.files.walk("trash")) == []


def test_what_a_killed_collection_moved_aside_comes_back(commit_artifact: Any, tmp_path: Path) -> None:
    store = Store.open(str(tmp_path / "store"))
    manifest = commit_artifact(store, "base")
    path = object_path(manifest.files["model/a.json"].sha256)
    aside = tmp_path / "store" / "trash" / path
    aside.parent.mkdir(parents=True)
    os.rename(tmp_path / "store" / path, aside)
    with pytest.raises(StoreDamaged):
        Store.open(str(tmp_path / "store")).find_artifact(manifest.fingerprint)
    collect(store, grace_s=0)
    assert Store.open(str(tmp_path / "store")).find_artifact(manifest.fingerprint) == manifest


def test_collections_may_run_at_once(commit_artifact: Any, tmp_path: Path) -> None:
    """Four collectors and four writers for a while: nothing that was committed is ever missing."""
    uri = str(tmp_path / "store")
    stop = threading.Event()
    problems: list[BaseException] = []
    committed: list[ArtifactManifest] = []

    def guarded(work: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            try:
                work()
            except BaseException as error:
                problems.append(error)
                stop.set()

        return run

    def write(index: int) -> None:
        store = Store.open(uri)
        for number in range(12):
            if stop.is_set():
                return
            put(store, f"orphan {index} {number}".encode())
            committed.append(commit_artifact(store, f"artifact {number}"))  # all four make the same ones

    def gather() -> None:
        while not stop.is_set():
            collect(Store.open(uri), grace_s=2.0)

    writers = [threading.Thread(target=guarded(lambda index=index: write(index))) for index in range(4)]
    collectors = [threading.Thread(target=guarded(gather)) for _ in range(4)]
    for thread in (*collectors, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    for thread in collectors:
        thread.join()
    assert problems == []
    store = Store.open(uri)
    assert len(committed) == 48
    assert len(store.list_artifacts()) == 12
    assert verify(store).damage == []
    sweep(store)
    assert not any(store.objects.has(sha256_hex(b"orphan %d %d" % (i, n)), 0) for i in range(4) for n in range(12))
    assert len(list(store.files.walk("objects"))) == 12 * 3


def test_an_object_that_is_put_again_is_young_again(
    open_store: Callable[[], Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_files, "YOUNG_S", -1.0)
    store = open_store()
    entry = put(store, b"bytes")
    before = store.files.modified_at(object_path(entry.sha256))
    assert before is not None
    time.sleep(1.1 if store.uri.startswith("s3") else 0.01)  # S3 tells time in seconds
    put(store, b"bytes")
    after = store.files.modified_at(object_path(entry.sha256))
    assert after is not None
    assert after > before
