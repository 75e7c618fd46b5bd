"""One suite for every kind of place: commits, names, leases, states and runs."""

from collections.abc import Callable

import pytest

from recipes.errors import RequestError, StageError, StoreDamaged
from tests.contract.store import places as things
from trainers.store.inspection import lineage, verify
from trainers.store.manifest import ArtifactManifest, DatasetManifest, Parent, sha256_hex
from trainers.store.objects import object_path
from trainers.store.store import Fenced, Store


def test_commit_and_find(open_store: Callable[[], Store]) -> None:
    store = open_store()
    store.probe_writable()
    assert store.find_artifact(things.FINGERPRINT) is None
    manifest = things.artifact(store, metrics={"loss": 1.5}, versions={"torch": "2"})
    committed = store.put_artifact(manifest)
    assert (committed.manifest, committed.first) == (manifest, True)
    other = things.artifact(store, content=b"of another run")
    again = open_store().put_artifact(other)
    assert (again.manifest, again.first) == (manifest, False)
    assert open_store().find_artifact(things.FINGERPRINT) == manifest
    assert open_store().list_artifacts() == [manifest]
    folder = open_store().folder(manifest, "model")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "config.json": b"{}",
        "model.safetensors": b"weights",
    }
    assert open_store().folder(manifest, "model") == folder


def test_a_commit_needs_its_objects(store: Store) -> None:
    manifest = things.artifact(store)
    store.objects.remove(manifest.files["model/model.safetensors"].sha256)
    with pytest.raises(StoreDamaged, match="1 objects are missing"):
        store.put_artifact(manifest)
    assert store.find_artifact(things.FINGERPRINT) is None


def test_a_damaged_artifact_is_made_again(open_store: Callable[[], Store], caplog: pytest.LogCaptureFixture) -> None:
    store = open_store()
    manifest = things.artifact(store)
    store.put_artifact(manifest)
    path = object_path(manifest.files["model/model.safetensors"].sha256)
    things.overwrite(store, path, None)
    with pytest.raises(StoreDamaged, match=path):
        open_store().find_artifact(things.FINGERPRINT)
    assert open_store().list_artifacts() == []
    second = things.artifact(store, content=b"made again")
    assert open_store().put_artifact(second).first
    assert open_store().find_artifact(things.FINGERPRINT) == second
    things.overwrite(store, "refs/artifacts/" + things.FINGERPRINT + "/000002", b"{")
    things.overwrite(store, "refs/artifacts/" + things.FINGERPRINT + "/000001", None)
    with pytest.raises(StoreDamaged, match="000002"):
        open_store().find_artifact(things.FINGERPRINT)


def test_the_older_whole_commit_is_used(open_store: Callable[[], Store], caplog: pytest.LogCaptureFixture) -> None:
    store = open_store()
    manifest = things.artifact(store)
    store.put_artifact(manifest)
    store._files.create(f"refs/artifacts/{things.FINGERPRINT}/000002", b"not a ref")
    assert open_store().find_artifact(things.FINGERPRINT) == manifest
    assert "/000001" in caplog.text
    assert "000002" in caplog.text


def test_names(open_store: Callable[[], Store]) -> None:
    store = open_store()
    one, two = things.artifact(store), things.artifact(store, fingerprint="cd" * 32, content=b"two")
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
        manifest = things.artifact(
            store, fingerprint=sha256_hex(name.encode()), content=name.encode(), stage=name,
            parents={f"of.{p}": Parent(fingerprint=made[p].fingerprint, digest=made[p].digest) for p in parents},
        )  # fmt: skip
        made[name] = store.put_artifact(manifest).manifest
    found = lineage(store, made["b"].fingerprint)
    assert [item.stage for item in found.ancestors] == ["a"]
    assert [item.stage for item in found.descendants] == ["c", "d"]
    assert [item.stage for item in store.list_artifacts()] == ["a", "b", "c", "d"]


def test_datasets(open_store: Callable[[], Store]) -> None:
    store = open_store()
    manifest = DatasetManifest(digest="12" * 32, files={"tokens.npy": things.put(store, b"tokens")}, report={"rows": 3})
    assert store.find_dataset("12" * 32) is None
    assert store.put_dataset(manifest) == manifest
    assert open_store().find_dataset("12" * 32) == manifest
    rival = DatasetManifest(digest="12" * 32, files={"tokens.npy": things.put(store, b"other")}, report={"rows": 3})
    assert open_store().put_dataset(rival) == manifest


def test_leases_fence(open_store: Callable[[], Store]) -> None:
    old, new = open_store(), open_store()
    first = old.take_lease("run", "base")
    old.commit_state(things.state(first, step=1), first)
    second = new.take_lease("run", "base")
    assert (first, second) == (1, 2)
    new.check_lease("run", "base", second)
    with pytest.raises(Fenced, match=r"lease 1 .*lease 2"):
        old.check_lease("run", "base", first)
    with pytest.raises(Fenced, match=r"lease 1 .*lease 2"):
        old.commit_state(things.state(first, step=2), first)
    with pytest.raises(StageError, match="lease 3 "):
        new.check_lease("run", "base", 3)
    latest = new.latest_state("run", "base")
    assert latest is not None
    assert latest.step == 1
    new.commit_state(things.state(second, step=2), second)
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
    old.commit_state(things.state(first, step=1), first)
    old_is_publishing = True
    with pytest.raises(Fenced, match=r"lease 1 .*lease 2"):
        old.commit_state(things.state(first, step=2), first)
    latest = new.latest_state("run", "base")
    assert latest is not None
    assert latest.step == 1


def test_states_fall_back_and_are_kept(open_store: Callable[[], Store], caplog: pytest.LogCaptureFixture) -> None:
    store = open_store()
    assert store.latest_state("run", "base") is None
    lease = store.take_lease("run", "base")
    numbers = [store.commit_state(things.state(lease, step=step), lease) for step in range(1, 6)]
    assert store.commit_state(things.state(lease, step=5), lease) == numbers[-1]
    assert store.keep_states("run", "base", keep=2) == 3
    assert store.keep_states("run", "base", keep=2) == 0
    things.overwrite(store, f"refs/states/run/base/{numbers[-1]:06d}", b"")
    latest = open_store().latest_state("run", "base")
    assert latest is not None
    assert latest.step == 4
    assert f"/{numbers[-2]:06d} (step 4)" in caplog.text
    assert f"refs/states/run/base/{numbers[-1]:06d}" in caplog.text
    assert store.keep_states("run", "base", keep=1) == 0
    things.overwrite(store, f"refs/states/run/base/{numbers[-2]:06d}", b"")
    with pytest.raises(StoreDamaged, match="refs/states/run/base/"):
        open_store().latest_state("run", "base")
    with pytest.raises(ValueError, match="keep"):
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
    manifest = things.artifact(store)
    store.put_artifact(manifest)
    lease = store.take_lease("run", "base")
    store.commit_state(things.state(lease), lease)
    clean = verify(open_store())
    assert (clean.refs, clean.objects, clean.damage) == (3, 2, [])
    sha = manifest.files["model/model.safetensors"].sha256
    things.overwrite(store, object_path(sha), b"weightx")
    report = verify(open_store())
    assert [(item.path, item.refs) for item in report.damage] == [
        (object_path(sha), [f"refs/artifacts/{things.FINGERPRINT}/000001"])
    ]
    assert verify(open_store(), share=0.0).objects == 0
