"""One suite for every kind of place that a store can lie in; a kind counts when it passes."""

import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from recipes.errors import CapacityError, RequestError, StageError, StoreDamaged
from trainers.store.manifest import (
    ArtifactManifest,
    DatasetManifest,
    FileEntry,
    Layout,
    Parent,
    StateManifest,
    files_digest,
    sha256_hex,
)
from trainers.store.objects import object_path
from trainers.store.store import Fenced, Store

FINGERPRINT = "ab" * 32


def put(store: Store, data: bytes) -> FileEntry:
    return FileEntry(sha256=store.objects.put_bytes(data), bytes=len(data))


def artifact(
    store: Store, fingerprint: str = FINGERPRINT, content: bytes = b"weights", **changes: object
) -> ArtifactManifest:
    files = {"model/config.json": put(store, b"{}"), "model/model.safetensors": put(store, content)}
    fields = {
        "fingerprint": fingerprint,
        "digest": files_digest(files),
        "kind": "model",
        "stage": "base",
        "files": files,
    }
    return ArtifactManifest.model_validate({**fields, **changes})


def state(lease: int, step: int = 1, **values: int) -> StateManifest:
    return StateManifest(
        run="run", stage="base", fingerprint=FINGERPRINT, step=step, lease=lease, values=dict(values),
        layout=Layout(workers=1, micro_batch=1, accumulation=1),
    )  # fmt: skip


def overwrite(store: Store, path: str, data: bytes | None) -> None:
    """Damage a file behind the store's back."""
    files = store._files
    if files.root is not None:
        target = files.root / path
        target.chmod(0o644)
        target.unlink()
        if data is not None:
            target.write_bytes(data)
    elif data is None:
        files._fs.rm_file(files._full(path))  # type: ignore[attr-defined]
    else:
        files._fs.pipe_file(files._full(path), data)  # type: ignore[attr-defined]


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


def test_a_storm_of_errors_leaves_no_half_commit(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of ten requests fails, half of them after they took effect; each commit is tried until it is told done."""
    chooser = random.Random(12)
    store = Store.open(s3_uri)
    remote = store.files._fs  # type: ignore[attr-defined]

    def failing(name: str) -> Callable[..., object]:
        real = getattr(remote, name)

        def call(*args: object, **options: object) -> object:
            fails = chooser.random() < 0.1
            result = None if fails and chooser.random() < 0.5 else real(*args, **options)
            if fails:
                raise OSError("503 Slow Down")
            return result

        return call

    for name in ("pipe_file", "put_file", "cat_file", "info", "ls"):
        monkeypatch.setattr(remote, name, failing(name))
    refusals, committed = 0, []
    while len(committed) < 4:
        number = len(committed)
        try:
            made = artifact(store, fingerprint=sha256_hex(b"%d" % number), content=b"%d" % number)
            committed.append(store.put_artifact(made).manifest)
        except CapacityError:
            refusals += 1
            assert refusals < 200
    monkeypatch.undo()
    fresh = Store.open(s3_uri)
    assert refusals > 0
    assert fresh.verify().damage == []
    assert {item.fingerprint for item in fresh.list_artifacts()} == {item.fingerprint for item in committed}
    assert all(fresh.files.names(f"refs/artifacts/{item.fingerprint}") == ["000001"] for item in committed)


def test_an_altered_object_is_mended_by_putting_it_again(open_store: Callable[[], Store]) -> None:
    sha = open_store().objects.put_bytes(b"right")
    overwrite(open_store(), object_path(sha), b"wrong")
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
    overwrite(open_store(), object_path(sha), altered)
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


def test_commit_and_find(open_store: Callable[[], Store]) -> None:
    store = open_store()
    store.probe_writable()
    assert store.find_artifact(FINGERPRINT) is None
    manifest = artifact(store, metrics={"loss": 1.5}, versions={"torch": "2"})
    committed = store.put_artifact(manifest)
    assert (committed.manifest, committed.first) == (manifest, True)
    other = artifact(store, content=b"of another run")
    again = open_store().put_artifact(other)
    assert (again.manifest, again.first) == (manifest, False)
    assert open_store().find_artifact(FINGERPRINT) == manifest
    assert open_store().list_artifacts() == [manifest]
    folder = open_store().folder(manifest, "model")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "config.json": b"{}",
        "model.safetensors": b"weights",
    }
    assert open_store().folder(manifest, "model") == folder


def test_a_commit_needs_its_objects(store: Store) -> None:
    manifest = artifact(store)
    store.objects.remove(manifest.files["model/model.safetensors"].sha256)
    with pytest.raises(StoreDamaged, match="1 objects are missing"):
        store.put_artifact(manifest)
    assert store.find_artifact(FINGERPRINT) is None


def test_a_damaged_artifact_is_made_again(open_store: Callable[[], Store], caplog: pytest.LogCaptureFixture) -> None:
    store = open_store()
    manifest = artifact(store)
    store.put_artifact(manifest)
    path = object_path(manifest.files["model/model.safetensors"].sha256)
    overwrite(store, path, None)
    with pytest.raises(StoreDamaged, match=path):
        open_store().find_artifact(FINGERPRINT)
    assert open_store().list_artifacts() == []
    second = artifact(store, content=b"made again")
    assert open_store().put_artifact(second).first
    assert open_store().find_artifact(FINGERPRINT) == second
    overwrite(store, "refs/artifacts/" + FINGERPRINT + "/000002", b"{")
    overwrite(store, "refs/artifacts/" + FINGERPRINT + "/000001", None)
    with pytest.raises(StoreDamaged, match="000002"):
        open_store().find_artifact(FINGERPRINT)


def test_the_older_whole_commit_is_used(open_store: Callable[[], Store], caplog: pytest.LogCaptureFixture) -> None:
    store = open_store()
    manifest = artifact(store)
    store.put_artifact(manifest)
    store._files.create(f"refs/artifacts/{FINGERPRINT}/000002", b"not a ref")
    assert open_store().find_artifact(FINGERPRINT) == manifest
    assert "000001 is used instead of" in caplog.text
    assert "000002" in caplog.text


def test_names(open_store: Callable[[], Store]) -> None:
    store = open_store()
    one, two = artifact(store), artifact(store, fingerprint="cd" * 32, content=b"two")
    store.put_artifact(one)
    store.put_artifact(two)
    store.name_artifact("best", one.fingerprint)
    store.name_artifact("best", two.fingerprint)
    assert open_store().resolve("best") == two
    assert open_store().resolve("abababab") == one
    assert store.names() == {"best": two.fingerprint}
    for unknown in ("worst", "abab", "ffffffff"):
        with pytest.raises(RequestError, match=unknown):
            store.resolve(unknown)
    with pytest.raises(RequestError, match="ee"):
        store.name_artifact("good", "ee" * 32)


def test_lineage(store: Store) -> None:
    made: dict[str, ArtifactManifest] = {}
    for name, parents in {"a": [], "b": ["a"], "c": ["b"], "d": ["a", "c"]}.items():
        manifest = artifact(
            store, fingerprint=sha256_hex(name.encode()), content=name.encode(), stage=name,
            parents={f"of.{p}": Parent(fingerprint=made[p].fingerprint, digest=made[p].digest) for p in parents},
        )  # fmt: skip
        made[name] = store.put_artifact(manifest).manifest
    found = store.lineage(made["b"].fingerprint)
    assert [item.stage for item in found.ancestors] == ["a"]
    assert [item.stage for item in found.descendants] == ["c", "d"]
    assert [item.stage for item in store.list_artifacts()] == ["a", "b", "c", "d"]


def test_datasets(open_store: Callable[[], Store]) -> None:
    store = open_store()
    manifest = DatasetManifest(digest="12" * 32, files={"tokens.npy": put(store, b"tokens")}, report={"rows": 3})
    assert store.find_dataset("12" * 32) is None
    assert store.put_dataset(manifest) == manifest
    assert open_store().find_dataset("12" * 32) == manifest
    rival = DatasetManifest(digest="12" * 32, files={"tokens.npy": put(store, b"other")}, report={"rows": 3})
    assert open_store().put_dataset(rival) == manifest


def test_leases_fence(open_store: Callable[[], Store]) -> None:
    old, new = open_store(), open_store()
    first = old.take_lease("run", "base")
    old.commit_state(state(first, step=1), first)
    second = new.take_lease("run", "base")
    assert (first, second) == (1, 2)
    new.check_lease("run", "base", second)
    with pytest.raises(Fenced, match="lease 1 was superseded by lease 2"):
        old.check_lease("run", "base", first)
    with pytest.raises(Fenced, match="lease 1 was superseded by lease 2"):
        old.commit_state(state(first, step=2), first)
    with pytest.raises(StageError, match="lease 3 was never taken"):
        new.check_lease("run", "base", 3)
    latest = new.latest_state("run", "base")
    assert latest is not None
    assert latest.step == 1
    new.commit_state(state(second, step=2), second)
    assert new.take_lease("run", "other") == 1


def test_a_stale_writer_between_check_and_commit_is_refused(
    open_store: Callable[[], Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = open_store(), open_store()
    first = old.take_lease("run", "base")
    real_check, taken = old.check_lease, []

    def slow_check(run: str, stage: str, lease: int) -> None:
        real_check(run, stage, lease)
        if len(taken) < 1 and old_is_publishing:
            taken.append(new.take_lease(run, stage))  # the new holder comes right after the old one's check

    old_is_publishing = False
    monkeypatch.setattr(old, "check_lease", slow_check)
    old.commit_state(state(first, step=1), first)
    old_is_publishing = True
    with pytest.raises(Fenced, match="superseded by lease 2"):
        old.commit_state(state(first, step=2), first)
    latest = new.latest_state("run", "base")
    assert latest is not None
    assert latest.step == 1


def test_states_fall_back_and_are_kept(open_store: Callable[[], Store], caplog: pytest.LogCaptureFixture) -> None:
    store = open_store()
    assert store.latest_state("run", "base") is None
    lease = store.take_lease("run", "base")
    numbers = [store.commit_state(state(lease, step=step), lease) for step in range(1, 6)]
    assert store.commit_state(state(lease, step=5), lease) == numbers[-1]
    assert store.keep_states("run", "base", keep=2) == 3
    assert store.keep_states("run", "base", keep=2) == 0
    overwrite(store, f"refs/states/run/base/{numbers[-1]:06d}", b"")
    latest = open_store().latest_state("run", "base")
    assert latest is not None
    assert latest.step == 4
    assert f"{numbers[-2]:06d} (step 4) is used instead of refs/states/run/base/{numbers[-1]:06d}" in caplog.text
    assert store.keep_states("run", "base", keep=1) == 0
    overwrite(store, f"refs/states/run/base/{numbers[-2]:06d}", b"")
    with pytest.raises(StoreDamaged, match="no whole training state"):
        open_store().latest_state("run", "base")
    with pytest.raises(ValueError, match="keep at least one"):
        store.keep_states("run", "base", keep=0)


def test_runs(open_store: Callable[[], Store]) -> None:
    store = open_store()
    runs = [store.new_run("recipe").id for _ in range(3)]
    assert open_store().runs() == runs
    run = open_store().run(runs[0])
    assert run.exists()
    assert not store.run("never-20200101-000000-0000").exists()
    run.write_once("recipe.json", b"{}")
    run.write_once("recipe.json", b"{}")
    with pytest.raises(RequestError, match=r"another recipe\.json"):
        run.write_once("recipe.json", b"[]")
    assert run.read("recipe.json") == b"{}"
    assert run.find("none.json") is None
    with pytest.raises(RequestError, match=r"no none\.json"):
        run.read("none.json")
    writer = run.writer("metrics/base/1")
    writer.flush()
    for number in range(3):
        writer.append({"number": number})
    assert list(run.read_lines("metrics")) == []
    writer.flush()
    writer.append({"number": 3})
    writer.flush()
    second = run.writer("metrics/base/2")
    second.append({"number": 4, "text": "ä\u2028"})
    second.flush()
    resumed = open_store().run(runs[0]).writer("metrics/base/1")
    resumed.append({"number": 5})
    resumed.flush()
    lines = list(open_store().run(runs[0]).read_lines("metrics"))
    assert [line["number"] for line in lines] == [0, 1, 2, 3, 5, 4]
    assert lines[-1]["text"] == "ä\u2028"
    assert list(run.read_lines("metrics/base/2")) == lines[-1:]
    assert list(run.read_lines("samples")) == []


def test_verify_names_what_is_damaged(open_store: Callable[[], Store]) -> None:
    store = open_store()
    manifest = artifact(store)
    store.put_artifact(manifest)
    lease = store.take_lease("run", "base")
    store.commit_state(state(lease), lease)
    clean = open_store().verify()
    assert (clean.refs, clean.objects, clean.damage) == (3, 2, [])
    sha = manifest.files["model/model.safetensors"].sha256
    overwrite(store, object_path(sha), b"weightx")
    report = open_store().verify()
    assert [(item.path, item.refs) for item in report.damage] == [
        (object_path(sha), [f"refs/artifacts/{FINGERPRINT}/000001"])
    ]
    assert open_store().verify(share=0.0).objects == 0


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
