"""How many requests an object store gets, and how many at once: counted in the server, not timed."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from launch import api
from launch.records.journal import this_driver
from launch.records.record import RunRecord
from tests.contract.store import places as things
from tests.contract.store.places import S3Server
from trainers.store.collection import collect
from trainers.store.inspection import verify
from trainers.store.manifest import files_digest
from trainers.store.store import Store

ARTIFACTS, FILES = 4, 3
RUNS, EVENTS = 4, 12


@pytest.fixture
def counting(s3_server: S3Server) -> Callable[[], Any]:
    """Counts requests by method while a block runs; a listing is a LIST."""

    @contextmanager
    def count() -> Iterator[Counter[str]]:
        requests: Counter[str] = Counter()

        def note(method: str, path: str, query: str) -> None:
            requests["LIST" if method == "GET" and "list-type" in query else method] += 1

        s3_server.fault = note
        yield requests
        s3_server.fault = lambda method, path, query: None

    return count


@pytest.fixture
def store(s3_uri: str) -> Store:
    return Store.open(s3_uri)


@pytest.fixture
def artifacts(store: Store) -> list[str]:
    """Fingerprints of some artifacts of a few files; one has a name, one a pin."""
    fingerprints = [f"{number:064x}" for number in range(ARTIFACTS)]
    for number, fingerprint in enumerate(fingerprints):
        files = {f"model/{part}.json": things.put(store, f"{number} {part}".encode()) for part in range(FILES)}
        store.put_artifact(things.artifact(store, fingerprint, files=files, digest=files_digest(files)))
    store.name_artifact("best", fingerprints[0])
    store.pin(fingerprints[1])
    return fingerprints


def some_run(store: Store, is_ended: bool) -> RunRecord:
    """A run as its driver leaves it, of one stage."""
    recipe = {"recipe": {"name": "toy"}, "plan": [{"name": "base", "kind": "pretrain", "fingerprint": "0" * 64}]}
    record = RunRecord.create(store, "toy", {**recipe, "inputs": {}})
    journal = record.journal()
    journal.write("run_started", driver=this_driver(), next_s=5)
    for step in range(EVENTS - 2):
        journal.write("progress", stage="base", phase="train", step=step)
    if is_ended:
        journal.write("run_finished", state="completed", exit_code=0)
        record.write_end(journal)
    return record


def test_each_question_is_one_request(store: Store, counting: Any) -> None:
    store.files.create("refs/here", b"bytes")
    asked: dict[str, tuple[Callable[[], Any], Any, dict[str, int]]] = {
        "read": (lambda: store.files.read("refs/here"), b"bytes", {"GET": 1}),
        "size": (lambda: store.files.size("refs/here"), 5, {"HEAD": 1}),
        "size of none": (lambda: store.files.size("refs/missing"), None, {"HEAD": 1}),
        "size of a folder": (lambda: store.files.size("refs"), None, {"HEAD": 1}),
        "age of none": (lambda: store.files.modified_at("refs/missing"), None, {"HEAD": 1}),
        "names": (lambda: store.files.names("refs"), ["here"], {"LIST": 1}),
        "names of none": (lambda: store.files.names("refs/missing"), [], {"LIST": 1}),
        "walk": (lambda: list(store.files.walk("refs")), ["refs/here"], {"LIST": 1}),
        "walk of none": (lambda: list(store.files.walk("missing")), [], {"LIST": 1}),
        "sizes": (lambda: store.files.sizes("refs"), {"refs/here": 5}, {"LIST": 1}),
    }
    for what, (ask, answer, requests) in asked.items():
        with counting() as counted:
            assert ask() == answer, what
        assert counted == requests, what
    with counting() as counted, pytest.raises(FileNotFoundError):
        store.files.read("refs/missing")
    assert counted == {"GET": 1}


def test_a_folder_of_many_pages_is_listed_page_by_page(
    store: Store, counting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(7):
        store.files.create(f"many/{number}/x", b"1")
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "3")
    with counting() as counted:
        assert store.files.names("many") == [str(number) for number in range(7)]
        assert list(store.files.walk("many")) == [f"many/{number}/x" for number in range(7)]
    assert counted == {"LIST": 6}


def test_listing_artifacts_reads_two_objects_of_each(
    store: Store, artifacts: list[str], counting: Any, s3_uri: str
) -> None:
    with counting() as counted:
        found = Store.open(s3_uri).list_artifacts()
    assert sorted(manifest.fingerprint for manifest in found) == artifacts
    assert counted == {"LIST": 3, "GET": 2 * ARTIFACTS}
    with counting() as counted:
        assert store.names() == {"best": artifacts[0]}
        assert list(store.pins()) == [artifacts[1]]
    assert counted == {"LIST": 4, "GET": 2}


def test_listing_artifacts_still_sees_what_is_missing_cut_off_or_set_aside(
    store: Store, artifacts: list[str], s3_uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    first, second, third = (store.find_artifact(fingerprint) for fingerprint in artifacts[:3])
    assert first
    assert second
    assert third
    things.overwrite(store, f"objects/{_path(first.files['model/0.json'].sha256)}", None)
    things.overwrite(store, f"objects/{_path(second.files['model/0.json'].sha256)}", b"longer than before")
    verify(store, set_aside=True)
    things.overwrite(store, f"refs/artifacts/{third.fingerprint}/000001", b"not JSON")
    found = Store.open(s3_uri).list_artifacts()
    assert sorted(manifest.fingerprint for manifest in found) == artifacts[3:]
    assert "no whole commit" in caplog.text


def _path(sha256: str) -> str:
    return f"{sha256[:2]}/{sha256[2:]}"


def test_verifying_and_collecting_ask_for_no_size_before_they_read(
    store: Store, artifacts: list[str], counting: Any
) -> None:
    with counting() as counted:
        report = verify(store)
    assert not report.damage
    num_refs, num_objects = ARTIFACTS + 2, ARTIFACTS * FILES
    assert counted["HEAD"] == 0
    assert counted["GET"] == num_refs + ARTIFACTS + 2 * num_objects  # headers, then bytes
    with counting() as counted:
        found = collect(store, dry_run=True)
    assert counted["HEAD"] == found.waiting_objects == 2  # no artifact names them
    assert counted["GET"] == num_refs + ARTIFACTS + found.waiting_objects


def test_status_of_ended_runs_reads_two_small_objects_of_each(store: Store, counting: Any, s3_uri: str) -> None:
    runs = [some_run(store, is_ended=True).run for _ in range(RUNS)]
    with counting() as counted:
        found = api.status(store=s3_uri)
    assert [summary.run for summary in found] == runs
    assert {summary.state for summary in found} == {"completed"}
    # Of each run the names in journal/, what its driver wrote last, and a look for what came later.
    assert counted == {"LIST": 1 + RUNS, "GET": 2 * RUNS}


def test_status_of_a_running_run_reads_each_segment_once(store: Store, counting: Any, s3_uri: str) -> None:
    some_run(store, is_ended=False)
    with counting() as counted:
        (summary,) = api.status(store=s3_uri)
    assert summary.state == "running"
    assert counted == {"LIST": 3, "GET": 2 + EVENTS - 1}  # the recipe, and a look for one that was revised


def test_runs_segments_and_artifacts_are_asked_for_at_once(
    store: Store, artifacts: list[str], s3_server: S3Server, s3_uri: str
) -> None:
    """A request waits until four are under way: one by one none would be answered."""
    for _ in range(4):
        some_run(store, is_ended=True)
    running = some_run(store, is_ended=False)
    asks: dict[str, Callable[[], Any]] = {
        "journal/": lambda: api.status(store=s3_uri),
        f"runs/{running.run}/journal/": lambda: running.events(),
        "refs/artifacts/": lambda: Store.open(s3_uri).list_artifacts(),
    }
    for part, ask in asks.items():
        barrier = threading.Barrier(4)
        left = threading.Semaphore(4)

        def wait(
            method: str, path: str, query: str, part: str = part, barrier: Any = barrier, left: Any = left
        ) -> None:
            if method == "GET" and part in path and "list-type" not in query and left.acquire(blocking=False):
                barrier.wait(timeout=10)

        s3_server.fault = wait
        assert ask()
        assert not left.acquire(blocking=False), part
