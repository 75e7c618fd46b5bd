"""What people give to the store's commands by mistake, and what else may lie in a store's folders."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from launch.store_commands import store_app
from recipes.errors import RequestError, StoreDamaged
from trainers.store.origins import note_origin, origins
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
    assert f"there is no store at {place}" in str(found.exception)
    assert sorted(tmp_path.rglob("*")) == before


def test_other_files_among_refs_are_no_refs(commit_artifact: Any, store: Store, tmp_path: Path) -> None:
    """Digits that are not ASCII, numbers written otherwise, an editor's copies."""
    made = commit_artifact(store, "base")
    folder = tmp_path / "store" / "refs" / "artifacts" / made.fingerprint
    for name in ("1", "0000002", "²", "٣", "000001~", "000002.tmp", "-00001"):
        (folder / name).write_text("{}")
    assert store.list_artifacts() == [made]
    assert store.verify().damage == []
    assert store.verify().refs == 1
    assert commit_artifact(store, "base") == made


def test_an_import_s_record_without_a_source_is_damage(commit_artifact: Any, store: Store, tmp_path: Path) -> None:
    made = commit_artifact(store, "base")
    note_origin(store.files, made.fingerprint, "here")
    record = tmp_path / "store" / "refs" / "imports" / made.fingerprint / "000001"
    record.chmod(0o644)
    record.write_text('{"format":1}')
    with pytest.raises(StoreDamaged, match=f"{made.fingerprint}/000001: the record of an import has no 'source'"):
        origins(store.files, made.fingerprint)
