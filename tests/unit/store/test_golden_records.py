"""Pins, uses, lists of a collection, notes on damage, origins and a bundle of the first version are read today."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from trainers.store.bundle import read_bundle
from trainers.store.collection import collect
from trainers.store.dataset_refs import DatasetUse, all_uses
from trainers.store.import_records import origins
from trainers.store.inspection import verify
from trainers.store.manifest import sha256_hex
from trainers.store.objects import object_path
from trainers.store.store import Store

sys.path.insert(0, str(Path(__file__).parent))
from write_golden_records import BASE, BROKEN, CHANGE, DATA, NOTE, ORPHAN, PROBLEM, RUN, SOURCE, main

sys.path.pop(0)

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    shutil.copytree(GOLDEN / "records-1", tmp_path / "store")
    return Store.open(str(tmp_path / "store"))


def test_every_record_counts(store: Store) -> None:
    assert store.pins() == {BASE: NOTE}
    assert list(all_uses(store.files)) == [DatasetUse(RUN, BASE, DATA)]
    assert [item.changes for item in store.list_artifacts()] == [[CHANGE]]
    found = [(origin.source, origin.bundle) for origin in origins(store.files, BASE)]
    assert found == [(SOURCE, None), ("the other team", sha256_hex(b"index"))]
    report = verify(store)
    assert (report.damage, report.aside) == ([], [f"refs/artifacts/{BROKEN}/000001"])
    note = json.loads(store.files.read(f"quarantine/refs/artifacts/{BROKEN}/000001"))
    assert note["problem"] == PROBLEM


def test_a_collection_deletes_what_the_list_names(store: Store) -> None:
    """It goes by the list of the first version, where the object was not touched since."""
    (listed,) = sorted(store.files.walk("gc"))
    path = object_path(sha256_hex(ORPHAN))
    at = json.loads(store.files.read(listed))["objects"][path]
    os.utime(Path(store.uri) / path, (at, at))
    assert collect(store, grace_s=0).removed_objects == 1
    assert store.files.size(path) is None
    assert verify(store).damage == []


def test_a_bundle_is_taken(tmp_path: Path) -> None:
    other = Store.open(str(tmp_path / "other"))
    (base,) = read_bundle(other, GOLDEN / "bundle-1")
    assert (base.fingerprint, base.changes) == (BASE, [CHANGE])
    assert verify(other).damage == []


def test_the_writer_writes_the_same(tmp_path: Path) -> None:
    main(str(tmp_path))

    def listing(root: Path) -> list[str]:
        return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())

    names = listing(tmp_path)
    assert names == [name for name in listing(GOLDEN) if name.startswith(("records-1/", "bundle-1/"))]
    for name in names:
        ours, golden = (tmp_path / name).read_bytes(), (GOLDEN / name).read_bytes()
        if "/refs/" in name or "/gc/" in name:
            assert json.loads(ours).keys() == json.loads(golden).keys(), name
        else:
            assert ours == golden, name
