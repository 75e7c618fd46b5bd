"""What a ref or a manifest may not name: another place's manifest, another run's blob, anything that is no object."""

from collections.abc import Callable
from pathlib import Path

import pytest

from recipes.errors import StoreDamaged
from trainers.store.commit_rules import owner_mark
from trainers.store.inspection import verify
from trainers.store.manifest import (
    ArtifactManifest,
    FileEntry,
    Layout,
    Slice,
    StateManifest,
    TensorEntry,
    canonical_json,
    files_digest,
)
from trainers.store.store import Store

FINGERPRINT, OTHER = "ab" * 32, "cd" * 32


@pytest.fixture
def open_store(tmp_path: Path) -> Callable[[], Store]:
    return lambda: Store.open(str(tmp_path / "store"))


@pytest.fixture
def store(open_store: Callable[[], Store]) -> Store:
    return open_store()


def put(store: Store, data: bytes) -> FileEntry:
    return FileEntry(sha256=store.objects.put_bytes(data), bytes=len(data))


def artifact_of(files: dict[str, FileEntry]) -> ArtifactManifest:
    return ArtifactManifest(
        fingerprint=FINGERPRINT, digest=files_digest(files), kind="model", stage="base", files=files
    )


def committed(store: Store) -> ArtifactManifest:
    return store.put_artifact(artifact_of({"model/a": put(store, b"weights")})).manifest


def state_object(store: Store, owner: str, content: bytes = b"w") -> FileEntry:
    """An object as training states have them."""
    end = len(content)
    header = canonical_json(
        {"__metadata__": {"owner": owner}, "w": {"dtype": "U8", "shape": [end], "data_offsets": [0, end]}}
    )
    return store.objects.put_chunks([len(header).to_bytes(8, "little"), header, content])


def state_of(entry: FileEntry, lease: int, step: int) -> StateManifest:
    piece = Slice(start=[0], shape=[1], object=entry, key="w")
    return StateManifest(
        run="run", stage="base", fingerprint=FINGERPRINT, step=step, lease=lease,
        tensors={"param": [TensorEntry(name="w", shape=[1], dtype="U8", slices=[piece])]},
        layout=Layout(workers=1, micro_batch=1, accumulation=1),
    )  # fmt: skip


OUTSIDE = ("../../../../../../etc/passwd", "/etc/passwd", "..", "AB" * 32, "ab" * 31, "", "ab" * 32 + "\n")


@pytest.mark.parametrize("target", [*OUTSIDE, 7, None, ["ab" * 32]])
def test_a_ref_names_an_object_and_nothing_else(store: Store, target: object) -> None:
    whole = committed(store)
    store._artifact_refs(whole.fingerprint).create(2, {"manifest": target, "bytes": 1})
    assert store.find_artifact(whole.fingerprint) == whole
    (damage,) = verify(store).damage
    assert damage.path.endswith("000002")
    assert "is not a SHA-256" in damage.problem
    assert store.names() == {}
    store.files.create("refs/names/best/000001", canonical_json({"format": 1, "fingerprint": target}))
    assert store.names() == {}


def test_a_ref_to_another_places_manifest_is_passed_over(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    """An artifact under another's fingerprint, a run's state under another run's, an artifact among the states."""
    whole = committed(store)
    record = store._artifact_refs(whole.fingerprint).read(1)
    named = {"manifest": record["manifest"], "bytes": record["bytes"]}
    store._artifact_refs(OTHER).create(1, named)
    with pytest.raises(StoreDamaged, match=f"manifest of refs/artifacts/{whole.fingerprint}, not"):
        store.find_artifact(OTHER)
    lease = store.take_lease("run", "base")
    mine = state_of(state_object(store, owner_mark("run", "base", lease, 1)), lease, 1)
    store.commit_state(mine, lease)
    log = store.states("run", "base")._refs
    stolen = {key: log.read(log.highest())[key] for key in ("manifest", "bytes")}
    theirs = store.states("theirs", "base")
    theirs.take_lease()
    theirs._refs.append(stolen)
    with pytest.raises(StoreDamaged, match=r"of refs/states/run/base, .* of refs/states/theirs/base"):
        store.latest_state("theirs", "base")
    log.append(named)
    assert store.latest_state("run", "base") == mine
    assert "manifest of refs/artifacts" in caplog.text
    assert len(verify(store).damage) == 2  # the third was set aside


def test_a_ref_of_another_size_is_damaged(store: Store) -> None:
    whole = committed(store)
    record = store._artifact_refs(whole.fingerprint).read(1)
    store._artifact_refs(whole.fingerprint).create(2, {"manifest": record["manifest"], "bytes": 1})
    assert store.find_artifact(whole.fingerprint) == whole
    assert "names 1 bytes of" in verify(store).damage[0].problem


def test_a_state_names_only_its_own_objects(open_store: Callable[[], Store]) -> None:
    store = open_store()
    lease = store.take_lease("run", "base")
    good = state_of(state_object(store, owner_mark("run", "base", lease, 1)), lease, 1)
    store.commit_state(good, lease)
    blobs = {
        "the training state theirs/base/1/1": state_object(store, owner_mark("theirs", "base", 1, 1)),
        f"the training state run/base/{lease}/1": next(good.objects()),
        "no training state": put(store, b"an artifact's file"),
    }
    for owner, blob in blobs.items():
        forged = state_of(blob, lease, 2)
        with pytest.raises(StoreDamaged, match=f"is wrong about 1 of its objects: objects/.* belongs to {owner}"):
            store.commit_state(forged, lease)
        store.states("run", "base")._refs.append(store._put_manifest(forged))
        assert open_store().latest_state("run", "base") == good
    report = verify(open_store())
    assert report.damage == []
    assert len(report.aside) == 3


def test_an_artifact_names_no_object_of_a_training_state(store: Store) -> None:
    """Retention would take it away."""
    blob = state_object(store, owner_mark("run", "base", 1, 1))
    forged = artifact_of({"model/model.safetensors": blob})
    with pytest.raises(StoreDamaged, match=r"objects/.* run/base/1/1"):
        store.put_artifact(forged)
    assert store.list_artifacts() == []
    store._artifact_refs(forged.fingerprint).append(store._put_manifest(forged))
    assert "run/base/1/1" in verify(store).damage[0].problem
