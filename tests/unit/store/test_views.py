"""Local folders of an artifact's files."""

from pathlib import Path

import pytest

from recipes.errors import RequestError, StoreDamaged
from trainers.store.inspection import verify
from trainers.store.manifest import ArtifactManifest, FileEntry, files_digest
from trainers.store.objects import object_path
from trainers.store.store import Store


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("TRAINWRIGHT_CACHE", str(tmp_path / "cache"))
    return Store.open(str(tmp_path / "store"))


@pytest.fixture
def manifest(store: Store) -> ArtifactManifest:
    contents = {
        "model/config.json": b"{}",
        "model/deep/file": b"deep",
        "adapter/config.json": b"[]",
        "report.json": b"1",
    }
    files = {name: FileEntry(sha256=store.objects.put_bytes(data), bytes=len(data)) for name, data in contents.items()}
    return ArtifactManifest(fingerprint="ab" * 32, digest=files_digest(files), kind="model", stage="base", files=files)


def listing(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_part_is_a_folder(store: Store, manifest: ArtifactManifest, tmp_path: Path) -> None:
    assert listing(store.folder(manifest, "model")) == {"config.json": b"{}", "deep/file": b"deep"}
    assert listing(store.folder(manifest, "adapter/")) == {"config.json": b"[]"}
    assert len(listing(store.folder(manifest))) == 4
    with pytest.raises(RequestError, match="no files under 'mod'"):
        store.folder(manifest, "mod")
    copied = store.folder(manifest, "model", into=tmp_path / "copy")
    assert listing(copied) == {"config.json": b"{}", "deep/file": b"deep"}
    (copied / "config.json").write_bytes(b"changed")
    assert verify(store).damage == []
    with pytest.raises(RequestError, match="not empty"):
        store.folder(manifest, "model", into=tmp_path / "copy")


def test_a_stale_folder_is_made_again(store: Store, manifest: ArtifactManifest) -> None:
    folder = store.folder(manifest, "model")
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/etc/hostname")
    assert listing(store.folder(manifest, "model"))["config.json"] == b"{}"


def test_a_damaged_file_is_not_shown(store: Store, manifest: ArtifactManifest) -> None:
    store.folder(manifest, "model")
    path = Path(store.uri) / object_path(manifest.files["model/deep/file"].sha256)
    path.chmod(0o644)
    path.write_bytes(b"peep")
    for opened in (store, Store.open(store.uri)):
        with pytest.raises(StoreDamaged, match="another hash"):
            opened.folder(manifest, "model")
