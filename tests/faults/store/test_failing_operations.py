"""Whichever operation of the file system fails or is the last: no half commit is seen, no acknowledged one is lost."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.errors import CapacityError
from trainers.store import local_files as files_module
from trainers.store.inspection import verify
from trainers.store.manifest import ArtifactManifest, FileEntry, Layout, StateManifest, files_digest, sha256_hex
from trainers.store.store import Fenced, Store

OPERATIONS = ("open", "write", "fsync", "link", "unlink", "mkdir", "fchmod", "rename", "utime")
STEPS = ("artifact", "state", "keep", "lease", "lines")


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the process runs after it."""


class FailingOs:
    """The os module whose n-th writing operation fails (0: none); after a kill every further one does. Never syncs."""

    def __init__(self, fail_at: int, error: int | None) -> None:
        self.fail_at = fail_at
        self.error = error
        self.count = 0
        self.dead = False

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in OPERATIONS:
            return real

        def call(*args: Any, **options: Any) -> Any:
            self.count += 1
            if self.dead or (self.count == self.fail_at and self.error is None):
                if not self.dead and name == "write":
                    real(args[0], bytes(args[1])[: len(args[1]) // 2])
                self.dead = True
                raise Killed
            if self.count == self.fail_at:
                assert self.error is not None
                raise OSError(self.error, os.strerror(self.error))
            return None if name == "fsync" else real(*args, **options)

        return call


class FailingSyncs:
    """The os module whose n-th fsync fails; notes what happens to a file that could not be synced."""

    def __init__(self, fail_at: int, error: int) -> None:
        self.fail_at = fail_at
        self.error = error
        self.count = 0
        self.failed = 0
        self.given_up: str | None = None
        self.wrong: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def fsync(self, descriptor: int) -> None:
        self.count += 1
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if path == self.given_up:
            self.wrong.append(f"{path} is synced again")
        if self.count == self.fail_at:
            self.given_up = None if os.path.isdir(path) else path  # a folder is synced again by the next commit
            self.failed += 1
            raise OSError(self.error, os.strerror(self.error))

    def link(self, source: Any, target: Any, **options: Any) -> None:
        if str(source) == self.given_up:
            self.wrong.append(f"{source} becomes {target}")
        os.link(source, target, **options)

    def replace(self, source: Any, target: Any) -> None:
        if str(source) == self.given_up:
            self.wrong.append(f"{source} becomes {target}")
        os.replace(source, target)


class ShortWrites:
    """The os module whose writes take half of what they are given, as a disk may."""

    def __init__(self) -> None:
        self.count = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def write(self, descriptor: int, data: Any) -> int:
        self.count += 1
        return os.write(descriptor, bytes(data)[: -(-len(data) // 2)])

    def fsync(self, descriptor: int) -> None:
        pass


class Work:
    """Does steps on a store and remembers what was acknowledged."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.artifacts: dict[str, ArtifactManifest] = {}
        self.steps: list[int] = []
        self.lines = 0
        self.lease = 0
        self.attempted = 0

    def do(self, step: str) -> None:
        store = Store.open(str(self.root))
        self.attempted += 1
        number = self.attempted
        if step == "artifact":
            fingerprint = sha256_hex(b"%d" % number)
            files = {f"model/{name}": put(store, f"{name}{number}".encode()) for name in ("a", "b")}
            manifest = ArtifactManifest(
                fingerprint=fingerprint, digest=files_digest(files), kind="model", stage="base", files=files
            )
            store.put_artifact(manifest)
            self.artifacts[fingerprint] = manifest
        elif step == "lease":
            self.lease = store.take_lease("run", "base")
        elif step == "state" and self.lease:
            manifest = StateManifest(
                run="run", stage="base", fingerprint="ab" * 32, step=number, lease=self.lease, values={"n": number},
                layout=Layout(workers=1, micro_batch=1, accumulation=1),
            )  # fmt: skip
            store.commit_state(manifest, self.lease)
            self.steps.append(number)
        elif step == "keep":
            store.keep_states("run", "base", keep=1)
        elif step == "lines":
            writer = store.run("run").writer("journal")
            writer.append({"n": number})
            writer.flush()
            self.lines += 1

    def check(self) -> None:
        store = Store.open(str(self.root))
        assert verify(store).damage == []
        for fingerprint, manifest in self.artifacts.items():
            assert store.find_artifact(fingerprint) == manifest
        latest = store.latest_state("run", "base")
        assert (latest.step if latest else 0) >= (self.steps[-1] if self.steps else 0)
        assert len(list(store.run("run").read_lines("journal"))) >= self.lines


def put(store: Store, data: bytes) -> FileEntry:
    return FileEntry(sha256=store.objects.put_bytes(data), bytes=len(data))


def run_with_fault(root: Path, steps: Sequence[str], fail_at: int, error: int | None) -> tuple[Work, FailingOs]:
    """Do the steps with one fault; a refused step is passed over, a kill ends the work."""
    work = Work(root)
    failing = FailingOs(fail_at, error)
    with patched(failing):
        for step in steps:
            try:
                work.do(step)
            except CapacityError as refused:
                assert str(root) in str(refused)  # noqa: PT017
            except Fenced:
                assert step == "state"
            except Killed:
                break
    return work, failing


@contextmanager
def patched(failing: FailingOs | FailingSyncs | ShortWrites) -> Iterator[None]:
    """Let the store work through another os module."""
    files_module.os = failing  # type: ignore[assignment]
    try:
        yield
    finally:
        files_module.os = os


LIFE = ("lease", "artifact", "state", "state", "keep", "lines")


@pytest.mark.parametrize(
    "error", [None, 5, 28, pytest.param(30, marks=pytest.mark.long)], ids=["kill", "EIO", "ENOSPC", "EROFS"]
)
def test_every_operation_of_a_short_life_fails_once(tmp_path: Path, error: int | None) -> None:
    number, points = 1, 0
    while True:
        root = tmp_path / str(number)
        work, failing = run_with_fault(root, LIFE, number, error)
        work.check()
        if failing.count < number:
            break
        if number % 4 == 0:
            with patched(FailingOs(0, None)):
                for step in LIFE:
                    work.do(step)
            work.check()
        shutil.rmtree(root)
        number, points = number + 1, points + 1
    print(f"{points} points")
    assert points > 100


def test_whatever_could_not_be_synced_is_given_up(tmp_path: Path) -> None:
    """Each fsync of a short life fails once: that call is refused, its file gets no name and is not synced again."""
    number = 1
    while True:
        work, failing = Work(tmp_path / str(number)), FailingSyncs(number, errno.EIO)
        refused: list[str] = []
        with patched(failing):
            for step in LIFE:
                try:
                    work.do(step)
                except CapacityError as refusal:
                    refused.append(str(refusal))
        if not failing.failed:
            break
        assert len(refused) == 1, f"fsync {number} of {failing.given_up}: {refused}"
        assert f"store {work.root}: cannot write" in refused[0]
        assert "Input/output error" in refused[0]
        assert failing.wrong == []
        assert list((work.root / "tmp").iterdir()) == []
        work.check()
        number += 1
    assert number > 40


def test_a_writer_with_patience_syncs_another_file(tmp_path: Path) -> None:
    """No room at an fsync: the bytes are written anew; the file that could not be synced is never trusted."""
    store = Store.open(str(tmp_path / "store"))
    said: list[str] = []
    store.wait_for_room(60, said.append)
    failing = FailingSyncs(1, errno.ENOSPC)
    with patched(failing):
        sha = store.objects.put_bytes(b"weights")
    assert failing.given_up is not None
    assert "/tmp/" in failing.given_up
    assert failing.wrong == []
    assert "room again" in said[-1]
    assert Store.open(store.uri).objects.get_bytes(sha) == b"weights"


def test_a_write_that_takes_a_part_is_gone_on_with(tmp_path: Path) -> None:
    work, short = Work(tmp_path), ShortWrites()
    with patched(short):
        for step in LIFE:
            work.do(step)
    work.check()
    assert (len(work.artifacts), len(work.steps), work.lines) == (1, 2, 1)
    assert short.count > 50


@given(
    st.lists(st.sampled_from(STEPS), min_size=1, max_size=8),
    st.integers(1, 150),
    st.sampled_from([None, 5, 28]),
    st.lists(st.sampled_from(STEPS), max_size=4),
)
def test_any_life_survives_a_fault_anywhere(
    before: list[str], fail_at: int, error: int | None, after: list[str]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        work, _ = run_with_fault(Path(folder) / "store", before, fail_at, error)
        work.check()
        with patched(FailingOs(0, None)):
            for step in ("lease", *after):
                work.do(step)
        work.check()


def test_the_check_sees_a_protocol_that_publishes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a store that writes refs before objects must be caught."""

    def publish_first(self: Store, manifest: ArtifactManifest) -> Any:
        refs = self._artifact_refs(manifest.fingerprint)
        data = b"a manifest that is put later"
        refs.create(refs.highest() + 1, {"manifest": sha256_hex(data), "bytes": len(data)})
        self.objects.put_bytes(data)

    monkeypatch.setattr(Store, "put_artifact", publish_first)
    caught = 0
    for number in range(1, 40):
        work, _ = run_with_fault(tmp_path / str(number), ["artifact"], number, None)
        try:
            work.check()
        except Exception:
            caught += 1
    assert caught > 0


def test_what_dead_writers_left_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_with_fault(tmp_path, ["artifact"], 8, None)
    left = os.listdir(tmp_path / "tmp")
    assert left
    store = Store.open(str(tmp_path))
    store.take_lease("run", "base")
    assert set(os.listdir(tmp_path / "tmp")) >= set(left)
    monkeypatch.setattr(files_module, "STALE_SECONDS", -1.0)
    store.take_lease("run", "base")
    assert os.listdir(tmp_path / "tmp") == []


def test_what_live_writers_hold_is_not_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "STALE_SECONDS", -1.0)
    store = Store.open(str(tmp_path))

    def chunks() -> Any:
        yield b"first"
        Store.open(str(tmp_path)).take_lease("run", "base")
        yield b"second"

    assert store.objects.put_chunks(chunks()).sha256 == sha256_hex(b"firstsecond")


def test_the_message_names_path_needed_and_free(tmp_path: Path) -> None:
    root = tmp_path / "store"
    expected = r"cannot write refs/x: No space left on device \(needed 4 bytes, free \d+"
    with patched(FailingOs(3, 28)), pytest.raises(CapacityError, match=expected):
        Store.open(str(root))._files.create("refs/x", b"data")
