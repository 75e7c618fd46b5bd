"""A power cut at any moment keeps what was acknowledged, and leaves no ref without what it names.

A model of the disk: a file's bytes last after its fsync, a name's coming or going after the fsync of its folder. Until
then each may have reached the disk or not, in any order and independently of all others, which is more than a file
system does. Whether some of these disks would be bad is looked at after every call.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from trainers.store import local_files as files_module
from trainers.store.objects import object_path
from trainers.store.refs import RefLog
from trainers.store.store import Store

sys.path.insert(0, str(Path(__file__).parent))
import life

sys.path.pop(0)


class DiskModel:
    """The os module over such a disk; `forgets` is what an fsync leaves out: files, folders, or names that went."""

    def __init__(self, root: Path, forgets: str | None = None) -> None:
        self.root = root
        self.forgets = forgets
        self.wrong: list[str] = []
        self.calls = 0
        self.most_disks = 1
        """The most different disks that a power cut at one moment could have left."""
        self._paths: dict[int, str] = {}
        self._lasting: set[str] = {str(root.parent)}
        self._pending: dict[str, list[bool]] = {}
        """Comings (True) and goings of names since their folder's fsync, oldest first."""
        self._synced: set[str] = set()
        """Paths whose bytes last."""
        self._named: dict[str, list[str]] = {}
        """What each ref needs."""
        self._acknowledged: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: Any, flags: int, *args: Any, **options: Any) -> int:
        descriptor = os.open(path, flags, *args, **options)
        self._paths[descriptor] = str(path)
        if flags & os.O_CREAT:
            self._change(str(path), True)
        return descriptor

    def fsync(self, descriptor: int) -> None:
        path = self._paths[descriptor]
        is_folder = os.path.isdir(path)
        if self.forgets == ("folders" if is_folder else "files"):
            return
        if not is_folder:
            self._synced.add(path)
            return
        for name in [name for name in self._pending if os.path.dirname(name) == path]:
            is_there = self._pending[name][-1]
            if is_there or self.forgets != "removals":
                del self._pending[name]
                (self._lasting.add if is_there else self._lasting.discard)(name)
        self.check()

    def link(self, source: Any, target: Any, **options: Any) -> None:
        os.link(source, target, **options)
        self._come(str(source), str(target))

    def rename(self, source: Any, target: Any) -> None:
        os.rename(source, target)
        self._come(str(source), str(target))
        self._change(str(source), False)

    def replace(self, source: Any, target: Any) -> None:
        self.rename(source, target)

    def unlink(self, path: Any) -> None:
        os.unlink(path)
        self._change(str(path), False)

    def note_folders(self) -> None:
        """Folders are made through pathlib: find those that are not yet known."""
        for folder, folders, _ in os.walk(self.root.parent):
            for path in (os.path.join(folder, name) for name in folders):
                self._synced.add(path)
                if path not in self._lasting and path not in self._pending:
                    self._change(path, True)

    def acknowledge(self, path: str, instead_of: str = "") -> None:
        """From now on this has to last; what it takes the place of need not any more."""
        self._acknowledged -= {instead_of}
        self._acknowledged.add(path)
        self.check()

    def check(self) -> None:
        """Look for a disk that a power cut might leave now and that would be bad."""
        self.calls += 1
        self.most_disks = max(self.most_disks, 2 ** sum(map(len, self._pending.values())))
        for ref, needed in self._named.items():
            if self._may_be_there(str(self.root / ref)):
                absent = [path for path in needed if not self._is_there(str(self.root / path))]
                if str(self.root / ref) not in self._synced:
                    absent.append("its own bytes")
                self.wrong += [f"{ref} may be there without {path}" for path in absent]
        lost = [path for path in self._acknowledged if not self._is_there(str(self.root / path))]
        self.wrong += [f"{path} was acknowledged and may be gone" for path in lost]

    def _may_be_there(self, path: str) -> bool:
        return path in self._lasting or any(self._pending.get(path, ()))

    def _is_there(self, path: str) -> bool:
        if path == str(self.root.parent):
            return True
        stays = path in self._lasting and False not in self._pending.get(path, ())
        return stays and path in self._synced and self._is_there(os.path.dirname(path))

    def _come(self, source: str, target: str) -> None:
        (self._synced.add if source in self._synced else self._synced.discard)(target)
        ref = os.path.relpath(target, self.root)
        if ref.startswith("refs/"):
            record = json.loads(Path(target).read_bytes())
            self._named[ref] = self._needed(record["manifest"]) if "manifest" in record else []
        self._change(target, True)

    def _needed(self, manifest: str) -> list[str]:
        found = json.loads((self.root / object_path(manifest)).read_bytes())
        hashes = [manifest, *(entry["sha256"] for entry in found.get("files", {}).values())]
        for entries in found.get("tensors", {}).values():
            hashes += [piece["object"]["sha256"] for entry in entries for piece in entry["slices"]]
        return [object_path(sha256) for sha256 in hashes]

    def _change(self, path: str, is_there: bool) -> None:
        self._pending.setdefault(path, []).append(is_there)
        self.check()


def live(root: Path, disk: DiskModel) -> None:
    """Live the life of life.py on the model; what it acknowledges has to last."""
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
    last_state = ""

    def acknowledge(what: str, value: object) -> None:
        nonlocal last_state
        match what:
            case "lease":
                disk.acknowledge(f"leases/run/base/{value:06d}")
            case "artifact":
                disk.acknowledge(f"refs/artifacts/{value}/000001")
            case "pin":
                disk.acknowledge(f"refs/pins/{value}/000001")
            case "unpinned":
                disk.acknowledge(f"refs/pins/{value}/000002")
            case "line":
                disk.acknowledge("runs/run/journal/000001.jsonl")
            case "state":
                log = store.states("run", "base")._refs
                disk.acknowledge(log.path(log.highest()), instead_of=last_state)
                last_state = log.path(log.highest())

    life.live(store, acknowledge)
    assert len(list(store.files.walk("refs/artifacts"))) == 1, "collection took no artifact"
    assert len(list(store.files.walk("refs/states"))) == 3, "retention took no state"


@pytest.mark.parametrize("forgets", [None, "files", "folders", "removals"])
def test_what_is_acknowledged_lasts_and_no_ref_outlives_what_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgets: str | None
) -> None:
    """The three negative controls leave out one kind of fsync, and the model notices."""
    disk = DiskModel(tmp_path / "store", forgets)
    monkeypatch.setattr(files_module, "os", disk)
    live(tmp_path / "store", disk)
    assert (disk.wrong == []) == (forgets is None), disk.wrong[:5]
    print(f"{disk.calls} moments, at one of them {disk.most_disks} different disks")
    assert disk.calls > 100
    if forgets == "removals":
        assert all("may be there without" in text for text in disk.wrong)


def test_objects_that_go_before_their_ref_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: refs are removed at the end, after the objects that they name."""
    disk = DiskModel(tmp_path / "store")
    monkeypatch.setattr(files_module, "os", disk)
    late: list[tuple[RefLog, int]] = []
    real_remove = RefLog.remove
    monkeypatch.setattr(RefLog, "remove", lambda log, number: late.append((log, number)))
    store = Store.open(str(tmp_path / "store"))
    lease = store.take_lease("run", "base")
    for step in (1, 2):
        life.state(store, "run", "base", lease, step, b"%d" % step)
    disk.wrong.clear()  # folders that pathlib makes are not followed here
    store.keep_states("run", "base", keep=1)
    for log, number in late:
        real_remove(log, number)
    assert any("refs/states/run/base/000002 may be there without objects/" in text for text in disk.wrong)
