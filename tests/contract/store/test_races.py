"""Several writers and readers of one store at once, in every kind of place: one winner, no ghost, no half state."""

import itertools
import os
import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recipes.errors import StoreDamaged
from tests.contract.store import places as things
from trainers.store import remote_files
from trainers.store.inspection import verify
from trainers.store.manifest import ArtifactManifest, FileEntry, files_digest, sha256_hex
from trainers.store.objects import object_path
from trainers.store.store import Fenced, Store

sys.path.insert(0, str(Path(__file__).parents[2] / "faults" / "store"))
from life import artifact, state

sys.path.pop(0)

OpenStore = Callable[[], Store]


def at_once(count: int, work: Callable[[int], None]) -> None:
    """Run it in so many threads; the first error of any is raised."""
    errors: list[BaseException] = []

    def run(index: int) -> None:
        try:
            work(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


# One winner


def race(open_store: OpenStore, writers: int, rounds: int) -> None:
    """All commit an artifact under one fingerprint, all take a lease of one stage, all commit a state under theirs."""
    stores = [open_store() for _ in range(writers)]
    entries = [
        FileEntry(sha256=store.objects.put_bytes(b"%d" % n), bytes=len(str(n))) for n, store in enumerate(stores)
    ]
    barrier = threading.Barrier(writers, timeout=120)
    for number in range(rounds):
        fingerprint, run = sha256_hex(b"round %d" % number), f"run-{number}"
        won: list[int] = []
        held: list[ArtifactManifest] = []
        leases: list[int] = []
        committed: list[int] = []

        def work(
            index: int, fingerprint: str = fingerprint, run: str = run, won: list[int] = won,
            held: list[ArtifactManifest] = held, leases: list[int] = leases, committed: list[int] = committed,
        ) -> None:  # fmt: skip
            store, files = stores[index], {"model/a": entries[index]}
            mine = ArtifactManifest(
                fingerprint=fingerprint, digest=files_digest(files), kind="model", stage="base", files=files
            )
            barrier.wait()
            found = store.put_artifact(mine)
            held.append(found.manifest)
            if found.first:
                won.append(index)
            barrier.wait()
            lease = store.take_lease(run, "base")
            leases.append(lease)
            barrier.wait()
            try:
                state(store, run, "base", lease, lease, b"%d" % lease)
                committed.append(lease)
            except Fenced as refused:
                assert f"lease {writers}" in str(refused)  # noqa: PT017

        at_once(writers, work)
        assert len(won) == 1
        assert {manifest.digest for manifest in held} == {files_digest({"model/a": entries[won[0]]})}
        assert sorted(leases) == list(range(1, writers + 1))
        assert committed == [writers]
        fresh = open_store()
        assert fresh.files.names(f"refs/artifacts/{fingerprint}") == ["000001"]
        latest = fresh.latest_state(run, "base")
        assert latest is not None
        assert latest.lease == writers
    assert list(open_store().files.walk("tmp")) == []


def test_racing_commits_and_leases_have_one_winner(open_store: OpenStore) -> None:
    race(open_store, *((3, 1) if open_store().uri.startswith("s3:") else (6, 2)))


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_32_writers_have_one_winner_in_every_round(open_store: OpenStore) -> None:
    """1,000 rounds in folders. On S3 and in memory 100: a round is some thousands of requests, which moto answers one
    after the other, and for each of which the memory file system looks at all of its files."""
    race(open_store, 32, 100 if open_store().files.root is None else 1000)


def test_the_same_content_at_once_is_one_object(open_store: OpenStore) -> None:
    """Writers put the same objects and commit the same artifacts, each with the same state of its own run."""
    made: list[FileEntry] = []
    writers = 3 if open_store().uri.startswith("s3:") else 8  # moto answers one request after the other
    barrier = threading.Barrier(writers, timeout=120)

    def work(index: int) -> None:
        store = open_store()
        for number in range(3):
            barrier.wait()
            made.extend(artifact(store, sha256_hex(b"%d" % number), 2).files.values())
        state(store, f"run-{index}", "base", store.take_lease(f"run-{index}", "base"), 1, b"the same in every run")

    at_once(writers, work)
    store = open_store()
    assert len({entry.sha256 for entry in made}) == 6
    # Two files and a manifest for each artifact; an object and a manifest for each state, which share none.
    assert len(list(store.files.walk("objects"))) == 3 * 3 + writers * 2
    assert len(store.list_artifacts()) == 3
    assert all(store.files.names(f"refs/artifacts/{item.fingerprint}") == ["000001"] for item in store.list_artifacts())
    assert verify(store).damage == []


def test_an_object_that_is_written_again_is_whole_at_every_moment(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four write an old object once more, four read it whole and in a range, and look at its size."""
    monkeypatch.setattr(remote_files, "YOUNG_S", -1.0)
    data = random.Random(0).randbytes(6_000_000)
    digest = open_store().objects.put_bytes(data)
    path, rounds = object_path(digest), 3 if open_store().uri.startswith("s3:") else 20

    def work(index: int) -> None:
        store = open_store()
        for _ in range(rounds):
            if index < 4:
                store.objects.put_bytes(data)
            else:
                assert store.files.size(path) == len(data)
                assert store.files.read(path) == data
                assert store.files.read_range(path, 5_000_000, 5_000_010) == data[5_000_000:5_000_010]
                assert store.objects.local_path(digest).read_bytes() == data

    at_once(8, work)
    assert verify(open_store()).damage == []


# A writer that is frozen while another takes over


class Frozen:
    """A place that is left alone for a while before the n-th thing that is asked of it."""

    ASKED = ("create", "put", "read", "read_range", "size", "names", "settle", "modified_at")

    def __init__(self, files: Any) -> None:
        self._files = files
        self.count = 0
        self.freeze_at = 0
        self.meanwhile: Callable[[], None] = lambda: None

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._files, name)
        if name not in self.ASKED:
            return found

        def call(*arguments: Any, **options: Any) -> Any:
            self.count += 1
            if self.count == self.freeze_at:
                self.meanwhile()
            return found(*arguments, **options)

        return call


def test_a_writer_frozen_anywhere_in_a_commit_leaves_no_ghost(open_store: OpenStore) -> None:
    """Whatever it was about to ask of the store: another took over meanwhile, and it is refused when it wakes."""
    refused, number = 0, 0
    while True:
        number += 1
        run = f"run-{number}"
        files = Frozen(open_store().files)
        old, new = Store(files), open_store()  # type: ignore[arg-type]
        first = old.take_lease(run, "base")
        state(old, run, "base", first, 1, b"first")
        taken: list[int] = []

        def take_over(new: Store = new, run: str = run, taken: list[int] = taken) -> None:
            taken.append(new.take_lease(run, "base"))
            state(new, run, "base", taken[0], 1, b"of the new writer")

        files.count, files.freeze_at, files.meanwhile = 0, number, take_over
        try:
            state(old, run, "base", first, 2, b"second")
        except Fenced:
            refused += 1
        if not taken:
            break
        latest = open_store().latest_state(run, "base")
        assert latest is not None
        assert latest.lease == taken[0], f"a ghost write after operation {number}"
        check_order(open_store(), run)
    assert number > 8
    assert refused >= number - 2, "only what was published before it froze may stand"


def check_order(store: Store, run: str) -> None:
    """No state was published under a lease after a higher one's barrier."""
    log = store.states(run, "base")._refs
    highest = 0
    for number in log.numbers():
        record = log.read(number)
        if "lease" in record:
            highest = max(highest, record["lease"])
        else:
            manifest: Any = store.read_ref(log.folder, record)
            assert manifest.lease >= highest, f"{log.path(number)} was published under a lease that was taken over"


# Damage, and readers beside retention


@pytest.mark.parametrize("what", ["shard", "manifest", "ref"])
def test_the_newest_whole_state_is_used(open_store: OpenStore, caplog: pytest.LogCaptureFixture, what: str) -> None:
    store = open_store()
    lease = store.take_lease("run", "base")
    states = [state(store, "run", "base", lease, step, b"%d" % step * 10) for step in (10, 20, 30)]
    newest = "refs/states/run/base/000004"
    manifest = store.states("run", "base")._refs.read(4)["manifest"]
    shard = next(states[-1].objects()).sha256
    victim = {"shard": object_path(shard), "manifest": object_path(manifest), "ref": newest}[what]
    things.overwrite(store, victim, b"x" if what == "ref" else None)
    assert open_store().latest_state("run", "base") == states[1]
    assert "refs/states/run/base/000003 (step 20)" in caplog.text
    assert newest in caplog.text
    if what == "shard":
        assert "10 steps lost" in caplog.text
    assert store.files.size(newest), "the bad one is kept"
    assert b'"problem"' in store.files.read(f"quarantine/{newest}")
    later = state(store, "run", "base", lease, 21, b"later" * 10)
    assert store.states("run", "base")._refs.highest() == 5, "its number stays taken"
    assert open_store().latest_state("run", "base") == later


def read_beside_retention(open_store: OpenStore, readers: int, commits: int) -> None:
    """Readers while a writer commits and drops: each gets a whole state, never an older one than before."""
    store = open_store()
    lease = store.take_lease("run", "base")
    state(store, "run", "base", lease, 1, b"x" * 2000)
    done = threading.Event()
    reads = itertools.count()

    def work(index: int) -> None:
        if index == 0:
            try:
                for step in range(2, commits + 2):
                    state(store, "run", "base", lease, step, random.Random(step).randbytes(2000))
                    store.keep_states("run", "base", keep=1)
            finally:
                done.set()
            return
        mine, last = open_store(), 0
        while not done.is_set():
            found = mine.latest_state("run", "base")
            next(reads)
            assert found is not None
            assert found.step >= last
            last = found.step

    at_once(readers + 1, work)
    assert next(reads) > readers
    assert store.files.names("quarantine") == []


def test_readers_beside_retention_get_whole_states(open_store: OpenStore) -> None:
    read_beside_retention(open_store, *((2, 6) if open_store().uri.startswith("s3:") else (4, 16)))


@pytest.mark.long
def test_many_readers_beside_retention_get_whole_states(open_store: OpenStore) -> None:
    read_beside_retention(open_store, 16, 58)


def test_a_state_that_is_dropped_while_it_is_read_is_refused_before_its_first_byte(open_store: OpenStore) -> None:
    """A reader that has a manifest, of which retention takes the objects, hears of it by name."""
    store = open_store()
    lease = store.take_lease("run", "base")
    dropped = state(store, "run", "base", lease, 1, os.urandom(100))
    state(store, "run", "base", lease, 2, os.urandom(100))
    reader = open_store()
    assert store.keep_states("run", "base", keep=1) == 1
    entry = next(dropped.objects())
    for read in (reader.objects.get_bytes, reader.objects.local_path):
        with pytest.raises(StoreDamaged, match=f"{object_path(entry.sha256)} is missing"):
            read(entry.sha256)
