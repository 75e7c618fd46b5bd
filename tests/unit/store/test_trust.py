"""A store that others may have written is refused by name: world-writable, foreign-owned, links, special files."""

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from recipes.errors import CapacityError
from trainers.store import trust
from trainers.store.collection import collect
from trainers.store.inspection import verify
from trainers.store.manifest import ArtifactManifest, FileEntry, files_digest
from trainers.store.objects import object_path
from trainers.store.store import Store
from trainers.store.trust import Status, StoreUntrusted, Trust, User, judge_entry, judge_store

ME, OTHER, GROUP = 1000, 1001, 50
FINGERPRINT = "ab" * 32
REF = f"refs/artifacts/{FINGERPRINT}/000001"


def folder(mode: int, owner: int = ME, group: int = GROUP) -> Status:
    return Status(stat.S_IFDIR | mode, owner, group)


def file(mode: int = 0o444, owner: int = ME, kind: int = stat.S_IFREG) -> Status:
    return Status(kind | mode, owner, GROUP)


@pytest.mark.parametrize(
    ("found", "owners"),
    [
        (folder(0o755), {ME, 0}),
        (folder(0o755, owner=0), {ME, 0}),
        (folder(0o775), None),
        (folder(0o2775, owner=OTHER), None),
    ],
)
def test_whom_a_folder_makes_us_trust(found: Status, owners: set[int] | None) -> None:
    judged = judge_store(found, User(ME, frozenset({GROUP})))
    assert isinstance(judged, Trust)
    assert judged.owners == owners


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        (folder(0o755, owner=OTHER), "it belongs to "),
        (folder(0o2775, owner=OTHER, group=51), "it belongs to "),
        (folder(0o777), "every user may write in it (mode 0777)"),
        (folder(0o1777, owner=0), "every user may write in it (mode 1777)"),
    ],
)
def test_which_folder_is_no_store(found: Status, problem: str) -> None:
    judged = judge_store(found, User(ME, frozenset({GROUP})))
    assert isinstance(judged, str)
    assert judged.startswith(problem)


@pytest.mark.parametrize(
    ("entry", "trust", "problem"),
    [
        (file(), Trust({ME, 0}), None),
        (file(owner=0), Trust({ME, 0}), None),
        (file(owner=OTHER), Trust({ME, 0}), "it belongs to "),
        (file(owner=OTHER), Trust(None), None),
        (file(0o666), Trust(None), "every user may write it (mode 0666)"),
        (folder(0o1777), Trust({ME, 0}), "every user may write it (mode 1777)"),
        (file(0o666, owner=OTHER), Trust(None, judges_modes=False), None),
        (file(0o777, kind=stat.S_IFLNK), Trust(None, judges_modes=False), "it is a link"),
        (file(kind=stat.S_IFIFO), Trust({ME, 0}), "it is neither a file nor a folder"),
        (file(kind=stat.S_IFBLK), Trust(None), "it is neither a file nor a folder"),
    ],
)
def test_which_entry_is_read(entry: Status, trust: Trust, problem: str | None) -> None:
    found = judge_entry(entry, trust)
    assert found is None if problem is None else str(found).startswith(problem)


# On a disk


def put(store: Store, data: bytes) -> FileEntry:
    return FileEntry(sha256=store.objects.put_bytes(data), bytes=len(data))


def artifact(store: Store, content: bytes = b"weights") -> ArtifactManifest:
    files = {"model/a": put(store, content)}
    return ArtifactManifest(
        fingerprint=FINGERPRINT, digest=files_digest(files), kind="model", stage="base", files=files
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A store with an artifact and a run."""
    place = tmp_path / "store"
    store = Store.open(str(place))
    store.put_artifact(artifact(store))
    store.run("run").write_once("recipe.json", b"{}")
    store.take_lease("run", "base")
    return place


def by_link(path: Path) -> None:
    """Somewhere else lies the same file, and here a link to it."""
    store = next(parent for parent in path.parents if parent.name == "store")
    elsewhere = store.with_name(f"elsewhere-{path.name}")
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def by_pipe(path: Path) -> None:
    """Opening it would wait for ever."""
    path.unlink() if path.is_file() else path.rename(path.with_name("gone"))
    os.mkfifo(path)


def by_mode(path: Path) -> None:
    """Everybody may write it."""
    path.chmod(path.stat().st_mode | 0o002)


READS: dict[str, Callable[[Store], object]] = {
    REF: lambda store: store.find_artifact(FINGERPRINT),
    "refs/artifacts": lambda store: store.list_artifacts(),
    "refs": lambda store: store.find_artifact(FINGERPRINT),
    f"refs/artifacts/{FINGERPRINT}": lambda store: verify(store),
    "runs/run/recipe.json": lambda store: store.run("run").read("recipe.json"),
    "runs": lambda store: store.runs(),
    "leases/run/base": lambda store: store.check_lease("run", "base", 1),
    "refs/states/run/base/000001": lambda store: store.latest_state("run", "base"),
    "objects": lambda store: verify(store),
    "tmp": lambda store: store.objects.put_bytes(b"more"),
    "refs/states": lambda store: store.take_lease("run", "other"),
}


@pytest.mark.parametrize("harm", [by_link, by_pipe, by_mode], ids=["link", "pipe", "world-writable"])
@pytest.mark.parametrize("path", READS)
def test_what_leads_out_or_others_may_write_is_refused_by_name(
    root: Path, path: str, harm: Callable[[Path], None]
) -> None:
    harm(root / path)
    with pytest.raises(StoreUntrusted, match=rf"{root}: {path} is not read: (it is|every user)") as refused:
        READS[path](Store.open(str(root)))
    assert refused.value.exit_code == CapacityError.exit_code


@pytest.mark.parametrize("harm", [by_link, by_mode], ids=["link", "world-writable"])
def test_an_object_of_others_is_refused_and_replaced_when_it_is_put(root: Path, harm: Callable[[Path], None]) -> None:
    entry = artifact(Store.open(str(root))).files["model/a"]
    path = object_path(entry.sha256)
    harm(root / path)
    objects = Store.open(str(root)).objects
    for read in (objects.get_bytes, objects.local_path, objects.read_header):
        with pytest.raises(StoreUntrusted, match=f"{path} is not read"):
            read(entry.sha256)
    with pytest.raises(StoreUntrusted, match=path):
        collect(Store.open(str(root)), grace_s=0)
    assert Store.open(str(root)).objects.put_bytes(b"weights") == entry.sha256
    assert verify(Store.open(str(root))).damage == []
    assert stat.S_IMODE((root / path).lstat().st_mode) == 0o444


def test_a_world_writable_store_is_refused_until_it_is_declared(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root.chmod(0o1777)
    with pytest.raises(StoreUntrusted, match=rf"store {root} .* \(mode 1777\)"):
        Store.open(str(root)).list_artifacts()
    with pytest.raises(StoreUntrusted, match="TRAINWRIGHT_TRUST_STORE"):
        Store.open(str(root)).probe_writable()
    monkeypatch.setenv(trust.TRUST_VARIABLE, f"/other{os.pathsep}{root}")
    assert len(Store.open(str(root)).list_artifacts()) == 1
    by_link(root / REF)
    with pytest.raises(StoreUntrusted, match=f"{REF}.* a link"):
        Store.open(str(root)).find_artifact(FINGERPRINT)


def test_a_new_store_in_a_world_writable_folder_is_ones_own_whatever_the_umask(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    before = os.umask(0)
    try:
        store = Store.open(str(tmp_path / "store"))
        store.put_artifact(artifact(store))
        store.folder(store.resolve(FINGERPRINT), "model")
        store.take_lease("run", "base")
    finally:
        os.umask(before)
    modes = [path.lstat().st_mode for path in (tmp_path / "store", *(tmp_path / "store").glob("[!c]*/**/*"))]
    assert not any(mode & 0o002 for mode in modes)
    assert not (tmp_path / "store" / "cache").stat().st_mode & 0o007
    assert Store.open(str(tmp_path / "store")).find_artifact(FINGERPRINT) is not None


def test_a_store_of_another_user_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root.chmod(0o755)
    monkeypatch.setattr(User, "present", lambda: User(424242, frozenset({424242})))
    if root.stat().st_uid == 0:
        monkeypatch.setattr(trust, "ROOT_USER", 424243)
    with pytest.raises(StoreUntrusted, match=rf"store {root} .* user 424242"):
        Store.open(str(root)).find_artifact(FINGERPRINT)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("path", READS)
def test_what_another_user_left_in_a_store_is_refused(root: Path, path: str) -> None:
    root.chmod(0o755)
    os.chown(root / path, 424242, 424242)
    with pytest.raises(StoreUntrusted, match=f"{path} .* user 424242"):
        READS[path](Store.open(str(root)))
    root.chmod(0o775)  # shared with a group on purpose
    READS[path](Store.open(str(root)))


def test_the_command_line_says_which_file_and_ends_with_3(root: Path) -> None:
    by_link(root / REF)
    found = subprocess.run(
        [sys.executable, "-m", "launch.cli", "store", "ls", "--store", str(root)], capture_output=True, text=True
    )
    assert found.returncode == CapacityError.exit_code, found.stderr
    assert REF in found.stdout + found.stderr
    assert "Traceback" not in found.stderr
