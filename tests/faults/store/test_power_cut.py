"""A power cut keeps what was synced: acknowledged commits are in it, and no ref is written before what it names."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from trainers.store import local_files as files_module
from trainers.store.manifest import ArtifactManifest, FileEntry, Layout, StateManifest, files_digest, sha256_hex
from trainers.store.store import Store


class DiskModel:
    """The os module with a model of the disk: bytes last after fsync of the file, names after fsync of their folder."""

    def __init__(self, root: Path, forgets: str | None = None) -> None:
        self.root = root
        self.forgets = forgets
        self._paths: dict[int, str] = {}
        self._synced_files: set[str] = set()
        self._pending: set[str] = set()
        self.names: set[str] = {str(root.parent)}
        self.linked: list[tuple[str, set[str]]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: Any, *args: Any, **options: Any) -> int:
        descriptor = os.open(path, *args, **options)
        self._paths[descriptor] = str(path)
        return descriptor

    def fsync(self, descriptor: int) -> None:
        path = self._paths[descriptor]
        is_folder = os.path.isdir(path)
        if self.forgets == ("folders" if is_folder else "files"):
            return
        if is_folder:
            lasting = {name for name in self._pending if os.path.dirname(name) == path}
            self._pending -= lasting
            self.names |= lasting
        else:
            self._synced_files.add(path)

    def link(self, source: Any, target: Any) -> None:
        self.linked.append((str(target), self.lasting_files()))
        os.link(source, target)
        if str(source) in self._synced_files:
            self._synced_files.add(str(target))
        self._pending.add(str(target))

    def note_folders(self) -> None:
        """Folders are made through pathlib: find those that are not yet known."""
        for folder, folders, _ in os.walk(self.root.parent):
            for name in folders:
                path = os.path.join(folder, name)
                if path not in self.names:
                    self._pending.add(path)

    def lasting_files(self) -> set[str]:
        """Files that a power cut would leave, relative to the store."""

        def lasts(path: str) -> bool:
            return path == str(self.root.parent) or (path in self.names and lasts(os.path.dirname(path)))

        return {os.path.relpath(path, self.root) for path in self._synced_files if lasts(path)}


def live(root: Path, disk: DiskModel) -> list[str]:
    """Commit one of everything; returns what is wrong with what would be left."""
    store = Store.open(str(root))
    real_make = store._files._make_folder  # type: ignore[attr-defined]

    def make(folder: Path, durable: bool) -> None:
        if str(folder) not in store._files._durable_folders:  # type: ignore[attr-defined]
            if folder != root:
                make(folder.parent, durable)
            folder.mkdir(exist_ok=True)
            disk.note_folders()
        real_make(folder, durable)

    store._files._make_folder = make  # type: ignore[attr-defined]
    acknowledged: list[str] = []
    lease = store.take_lease("run", "base")
    acknowledged.append(f"leases/run/base/{lease:06d}")
    for number in range(3):
        files = {"model/a": FileEntry(sha256=store.objects.put_bytes(b"%d" % number), bytes=1)}
        fingerprint = sha256_hex(b"f%d" % number)
        store.put_artifact(
            ArtifactManifest(
                fingerprint=fingerprint, digest=files_digest(files), kind="model", stage="base", files=files
            )
        )
        acknowledged.append(f"refs/artifacts/{fingerprint}/000001")
        state = StateManifest(
            run="run", stage="base", fingerprint=fingerprint, step=number, lease=lease,
            layout=Layout(workers=1, micro_batch=1, accumulation=1),
        )  # fmt: skip
        acknowledged.append(f"refs/states/run/base/{store.commit_state(state, lease):06d}")
    writer = store.run("run").writer("journal")
    writer.append({"a": 1})
    writer.flush()
    acknowledged.append("runs/run/journal/000001.jsonl")

    left = disk.lasting_files()
    wrong = [f"acknowledged and lost: {path}" for path in acknowledged if path not in left]
    for target, lasting in disk.linked:
        path = os.path.relpath(target, root)
        if path.startswith("refs/"):
            record = json.loads((root / path).read_bytes())
            if "manifest" in record:
                named = [record["manifest"]]
                manifest = json.loads(store.objects.get_bytes(record["manifest"]))
                named += [entry["sha256"] for entry in manifest.get("files", {}).values()]
                wrong += [f"{path} before {sha}" for sha in named if f"objects/{sha[:2]}/{sha[2:]}" not in lasting]
    return wrong


@pytest.mark.parametrize("forgets", [None, "files", "folders"])
def test_what_is_acknowledged_lasts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgets: str | None) -> None:
    """The two negative controls leave out one kind of fsync, and the model notices."""
    disk = DiskModel(tmp_path / "store", forgets)
    monkeypatch.setattr(files_module, "os", disk)
    wrong = live(tmp_path / "store", disk)
    assert (wrong == []) == (forgets is None), wrong[:5]
