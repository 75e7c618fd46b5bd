"""What people give to the store's commands by mistake, and what else may lie in a store's folders."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from launch.cli.store_commands import store_app
from recipes.errors import CapacityError, RequestError, StoreDamaged
from trainers.store.bundle import write_bundle
from trainers.store.collection import collect
from trainers.store.export import export
from trainers.store.import_records import note_origin, origins
from trainers.store.inspection import verify
from trainers.store.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(str(tmp_path / "store"))


@pytest.mark.parametrize("command", [["verify"], ["gc", "--grace", "0"], ["pin"], ["lineage", "abcdef01"]])
@pytest.mark.parametrize("what", ["another folder", "an empty folder", "a file", "nothing"])
def test_a_folder_that_is_no_store_is_refused_and_stays_as_it_is(tmp_path: Path, command: list[str], what: str) -> None:
    place = tmp_path / "models"
    if what.endswith("folder"):
        place.mkdir()
    if what == "another folder":
        (place / "config.json").write_text("{}")
    if what == "a file":
        place.write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    found = CliRunner().invoke(store_app, [*command, "--store", str(place)])
    assert isinstance(found.exception, RequestError)
    assert str(place) in str(found.exception)
    assert sorted(tmp_path.rglob("*")) == before


def test_other_files_among_refs_are_no_refs(commit_artifact: Any, store: Store, tmp_path: Path) -> None:
    """Digits that are not ASCII, numbers written otherwise, an editor's copies."""
    made = commit_artifact(store, "base")
    folder = tmp_path / "store" / "refs" / "artifacts" / made.fingerprint
    for name in ("1", "0000002", "²", "٣", "000001~", "000002.tmp", "-00001"):
        (folder / name).write_text("{}")
    assert store.list_artifacts() == [made]
    assert verify(store).damage == []
    assert verify(store).refs == 1
    assert commit_artifact(store, "base") == made


def test_an_import_s_record_without_a_source_is_damage(commit_artifact: Any, store: Store, tmp_path: Path) -> None:
    made = commit_artifact(store, "base")
    note_origin(store.files, made.fingerprint, "here")
    record = tmp_path / "store" / "refs" / "imports" / made.fingerprint / "000001"
    record.chmod(0o644)
    record.write_text('{"format":1}')
    with pytest.raises(StoreDamaged, match=f"{made.fingerprint}/000001: .* 'source'"):
        origins(store.files, made.fingerprint)


def test_a_home_that_there_is_not_is_refused() -> None:
    with pytest.raises(RequestError, match="'~nobody-of-that-name/store'"):
        Store.open("~nobody-of-that-name/store")


def test_a_path_that_is_too_long_is_named(commit_artifact: Any, store: Store, tmp_path: Path) -> None:
    made, place = commit_artifact(store, "base"), tmp_path / ("x" * 300)
    for write in (lambda: write_bundle(store, [made], place), lambda: export(store, made, place)):
        with pytest.raises(CapacityError, match=r"x .*: File name too long"):
            write()
    found = CliRunner().invoke(store_app, ["import", str(place), "--store", store.uri])
    assert isinstance(found.exception, RequestError)
    assert "not a folder" in str(found.exception)


@pytest.mark.parametrize("what", ["refs", "objects"])
def test_a_file_in_the_place_of_a_stores_folder_is_damage(
    commit_artifact: Any, store: Store, tmp_path: Path, what: str
) -> None:
    """Nothing is taken for garbage, and no store for whole, because a folder cannot be listed."""
    commit_artifact(store, "base")
    folder = tmp_path / "store" / what
    shutil.rmtree(folder)
    folder.write_text("a file")
    with pytest.raises(StoreDamaged, match=f"{what} is not"):
        collect(store, grace_s=0)
    if what == "refs":
        with pytest.raises(StoreDamaged, match="refs is not"):
            verify(store)
    else:
        assert [item.path.partition("/")[0] for item in verify(store).damage] == ["refs"]


def test_nothing_is_collected_where_the_refs_are_missing(commit_artifact: Any, store: Store, tmp_path: Path) -> None:
    """As where one of two mounts is missing."""
    commit_artifact(store, "base")
    store.take_lease("run", "base")
    (tmp_path / "store" / "refs").rename(tmp_path / "refs")
    with pytest.raises(StoreDamaged, match=r"objects and leases, .*refs/"):
        collect(store, grace_s=0)


def test_a_folder_in_the_place_of_a_ref_is_passed_over(commit_artifact: Any, store: Store, tmp_path: Path) -> None:
    made = commit_artifact(store, "base")
    (tmp_path / "store" / "refs" / "artifacts" / made.fingerprint / "000002").mkdir()
    assert store.list_artifacts() == [made]
