"""A store that does not answer is named within a deadline; one that fails now and then is asked again until it does."""

import os
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recipes.errors import CapacityError
from tests.contract.store import places as things
from tests.contract.store.places import S3Server
from tests.unit.trainers import tiny_training as tiny
from trainers.store import remote_files
from trainers.store import slow_calls as watch
from trainers.store.collection import collect
from trainers.store.inspection import verify
from trainers.store.manifest import sha256_hex
from trainers.store.objects import object_path
from trainers.store.store import Store

Fault = Callable[[str, str, str], int | str | None]


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deadlines of a second."""
    for name, seconds in {"CONNECT_S": 0.5, "READ_S": 0.5, "ANSWER_S": 1.0, "TELL_S": 0.2}.items():
        monkeypatch.setattr(remote_files, name, seconds)
    monkeypatch.setattr(watch, "SLOW_S", 0.2)


def storm(chance: float, seed: int, *kinds: int | str) -> Fault:
    """That share of all requests fails, each in one of some ways."""
    chooser = random.Random(seed)
    return lambda method, path, query: chooser.choice(kinds) if chooser.random() < chance else None


@pytest.mark.parametrize("silence", ["silent", "reset", 503])
def test_a_silent_endpoint_is_named_within_the_deadline(
    s3_server: S3Server, s3_uri: str, soon: None, caplog: pytest.LogCaptureFixture, silence: int | str
) -> None:
    s3_server.fault = lambda method, path, query: silence
    for ask in (Store.open(s3_uri).list_artifacts, Store.open(s3_uri).probe_writable):
        began_at = time.monotonic()
        with pytest.raises(CapacityError, match=rf"store {s3_uri}: cannot (list|write) .*\(no answer for \d+ s\)"):
            ask()
        assert time.monotonic() - began_at < 60
    assert f"store {s3_uri}: waiting to list refs/artifacts" in caplog.text or "waiting for an answer" in caplog.text


def test_a_refusal_is_not_waited_for(s3_server: S3Server, s3_uri: str) -> None:
    """A bucket that is not there is asked for once, and looked at."""
    asked: list[str] = []
    s3_server.fault = lambda method, path, query: asked.append(method)
    with pytest.raises(CapacityError, match="s3://no-such-bucket-here/x: cannot write tmp/probe"):
        Store.open("s3://no-such-bucket-here/x").probe_writable()
    assert asked[0] == "PUT"
    assert len(asked) < 4


def test_a_writer_with_patience_waits_until_the_store_answers_again(
    s3_server: S3Server, s3_uri: str, soon: None
) -> None:
    """Nothing is skipped: what was to be written is there when the call returns."""
    store = Store.open(s3_uri)
    said: list[str] = []
    store.wait_for_room(60, said.append)
    failing_until = time.monotonic() + 3
    s3_server.fault = lambda method, path, query: "reset" if time.monotonic() < failing_until else None
    sha = store.objects.put_bytes(b"weights")
    assert time.monotonic() >= failing_until
    assert Store.open(s3_uri).objects.get_bytes(sha) == b"weights"
    assert any("at most 60 s" in text for text in said)
    assert "answers again after" in said[-1]


@pytest.mark.parametrize(
    "way", ["reset", pytest.param(503, marks=pytest.mark.long), pytest.param("lost", marks=pytest.mark.long)]
)
def test_training_goes_on_beside_a_store_that_goes_away_and_skips_no_save(
    s3_server: S3Server, s3_uri: str, soon: None, tmp_path: Path, way: int | str
) -> None:
    """Steps are made until the next save, which waits; when the store is back every state is in it, in order."""
    straight = tiny.run(tiny.open_checkpoint(str(tmp_path / "straight"))).digest
    checkpoint = tiny.open_checkpoint(s3_uri)
    said: list[str] = []
    checkpoint.store.wait_for_room(120, said.append)
    away: list[float] = []
    heard: list[tuple[int, float]] = []

    def hear(step: int) -> None:
        heard.append((step, time.monotonic()))
        if step == 3:
            away.append(time.monotonic() + 3)
            s3_server.fault = lambda method, path, query: way if time.monotonic() < away[0] else None

    ran = tiny.run(checkpoint, save_every=1, on_step=hear)
    assert ran.outcome is not None
    assert ran.outcome.steps_done == tiny.STEPS
    assert ran.digest == straight
    meanwhile = [step for step, at in heard if step > 3 and at < away[0]]
    assert meanwhile in ([], [4], [4, 5]), "one save is under way and the next one waits"
    assert any("at most 120 s" in text for text in said)
    assert any("answers again after" in text for text in said)
    states = Store.open(s3_uri).states("run", "base")
    assert states._refs.numbers()[-1] == 1 + tiny.STEPS, "the lease's barrier and a state after every step"
    latest = Store.open(s3_uri).latest_state("run", "base")
    assert latest is not None
    assert latest.step == tiny.STEPS
    assert tiny.run(tiny.open_checkpoint(s3_uri)).digest == straight


def commit_in_a_storm(server: Any, uri: str, chance: float, seed: int, count: int) -> None:
    """Every commit succeeds, each exactly once, whatever way its requests fail."""
    server.fault = storm(chance, seed, 500, 503, 409, "reset", "lost")
    store = Store.open(uri)
    store.wait_for_room(300, lambda text: None)
    made = []
    for number in range(count):
        content = sha256_hex(b"%d/%d" % (seed, number))
        made.append(store.put_artifact(things.artifact(store, fingerprint=content, content=content.encode())))
    lease = store.take_lease(f"run-{seed}", "base")
    server.fault = lambda method, path, query: None
    fresh = Store.open(uri)
    assert lease == 1
    assert all(item.first for item in made), "a write whose answer got lost was taken for another's"
    assert verify(fresh).damage == []
    assert {item.manifest.fingerprint for item in made} <= {item.fingerprint for item in fresh.list_artifacts()}
    assert all(fresh.files.names(f"refs/artifacts/{item.manifest.fingerprint}") == ["000001"] for item in made)


def test_a_storm_of_errors_leaves_no_half_commit(s3_server: S3Server, s3_uri: str) -> None:
    commit_in_a_storm(s3_server, s3_uri, 0.2, 12, 2)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(5))
def test_a_long_storm_of_errors_leaves_no_half_commit(s3_server: S3Server, s3_uri: str, seed: int) -> None:
    commit_in_a_storm(s3_server, s3_uri, 0.3, seed, 8)


PARTS = 3


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("way", ["reset", "lost", 500, 503])
@pytest.mark.parametrize("at", ["create", *range(1, PARTS + 1), "complete"])
def test_an_upload_in_parts_survives_a_fault_at_any_of_them(
    s3_server: S3Server, s3_uri: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, at: int | str, way: int | str
) -> None:
    store = Store.open(s3_uri)
    remote = store.files._fs  # type: ignore[attr-defined]
    real = remote.put_file
    monkeypatch.setattr(remote, "put_file", lambda *where: real(*where, chunksize=5 << 20))
    source = tmp_path / "large"
    source.write_bytes(random.Random(1).randbytes(5 << 20) * PARTS)
    left = [2]

    def fault(method: str, path: str, query: str) -> int | str | None:
        begins = method == "POST" and "uploads" in query
        ends = method == "POST" and "uploadId" in query
        is_it = begins if at == "create" else ends if at == "complete" else f"partNumber={at}&" in f"{query}&"
        if is_it and left[0]:
            left[0] -= 1
            return way
        return None

    s3_server.fault = fault
    entry = store.objects.put_file(source)
    assert left == [0], "the fault was not met"
    s3_server.fault = lambda method, path, query: None
    Store.open(s3_uri).objects.check(entry)
    # An answer that got lost leaves an upload that nobody goes on with.
    monkeypatch.setattr(remote_files, "UNFINISHED_S", -1.0)
    collect(store, grace_s=0)
    bucket = s3_uri.split("/")[2]
    assert not remote.call_s3("list_multipart_uploads", Bucket=bucket).get("Uploads")


def test_a_collection_aborts_uploads_that_nobody_goes_on_with(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(s3_uri)
    remote = store.files._fs  # type: ignore[attr-defined]
    bucket, prefix = s3_uri.split("/")[2:4]
    for key in (f"{prefix}/objects/ab/cd", "elsewhere/file"):
        remote.call_s3("create_multipart_upload", Bucket=bucket, Key=key)

    def unfinished() -> list[str]:
        found = remote.call_s3("list_multipart_uploads", Bucket=bucket)
        return [upload["Key"] for upload in found.get("Uploads", ())]

    monkeypatch.setattr(remote_files, "UNFINISHED_S", 100 * 365 * 86400.0)  # moto says that all were begun in 2010
    collect(store, grace_s=0)
    assert len(unfinished()) == 2, "somebody may be writing them"
    monkeypatch.undo()
    store.files.sweep()
    assert unfinished() == ["elsewhere/file"]


# File systems


def test_a_file_system_that_does_not_answer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "ANSWER_S", 0.3)
    monkeypatch.setattr(watch.os, "stat", lambda path: time.sleep(2))
    with pytest.raises(CapacityError, match=f"store {tmp_path}: .* \\d+ s"):
        Store.open(str(tmp_path))


def test_a_call_that_lasts_is_told_of_until_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "SLOW_S", 0.2)
    store = Store.open(str(tmp_path / "store"))
    said: list[str] = []
    store.wait_for_room(60, said.append)
    real = os.fsync

    def slow(descriptor: int) -> None:
        if len(said) < 2:
            time.sleep(0.8)
        real(descriptor)

    monkeypatch.setattr("trainers.store.local_files.os.fsync", slow)
    sha = store.objects.put_bytes(b"weights")
    assert re.search(r"waiting for the file system to fsync in tmp \(for \d+ s so far\)", said[0])
    assert store.objects.get_bytes(sha) == b"weights"
    told = len(said)
    time.sleep(0.3)
    assert len(said) == told
    assert object_path(sha) in list(store.files.walk("objects"))
