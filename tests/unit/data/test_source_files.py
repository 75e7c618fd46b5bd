"""A source's files in another folder: the same digest, the same rows, whatever the kind of source."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from pydantic import TypeAdapter

from launch.inputs.data_files import set_keys
from recipes.data.images import ImageSource
from recipes.data.text import Source
from recipes.errors import RequestError
from trainers.data.image_text_digest import image_text_digest
from trainers.data.images import read_images
from trainers.data.rows import read_rows
from trainers.data.source_digest import source_digest
from trainers.data.source_files import SourceFiles, source_files

TEXT: TypeAdapter[Any] = TypeAdapter(Source)
IMAGES: TypeAdapter[Any] = TypeAdapter(ImageSource)


def draw(path: Path, value: int) -> None:
    """An image of 4x4 pixels of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4, 3), value, dtype=np.uint8)).save(path)


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Data as a user has it: folders of files beside the recipe and elsewhere."""
    base = tmp_path / "home" / "recipes"
    base.mkdir(parents=True)
    write_lines(base / "b.jsonl", [{"text": "second file"}])
    write_lines(base / "a [1].jsonl", [{"text": "first file"}])
    write_lines(tmp_path / "home" / "z" / "c.jsonl", [{"text": "third file"}])
    (base / "rows.csv").write_text("text\nfrom a table\n")
    (base / "notes.txt").write_text("one\n\ntwo\n")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["columns"]}), base / "t.parquet")
    for number, name in enumerate(["cat/1.png", "cat/2.png", "dog/1.png"]):
        draw(base / "pets" / name, 40 * number)
        (base / "pets" / name).with_suffix(".txt").write_text(f"pet {number}")
    write_lines(base / "lines" / "p.jsonl", [{"image": "../pets/cat/1.png"}, {"image": "own.png"}])
    draw(base / "lines" / "own.png", 200)
    np.save(base / "x.npy", np.zeros((2, 4, 4), dtype=np.uint8))
    np.save(base / "w.npy", np.ones((1, 4, 4), dtype=np.uint8))
    return base


def move(found: SourceFiles, folder: Path) -> None:
    """Copy the files to their places, and take the old ones away."""
    for place, path in found.files.items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / place)


CASES: dict[str, tuple[TypeAdapter[Any], dict[str, Any]]] = {
    "jsonl by a pattern": (TEXT, {"source": "jsonl", "files": ["*.jsonl"]}),
    "jsonl out of order and elsewhere": (TEXT, {"source": "jsonl", "files": ["b.jsonl", "../z/c.jsonl"]}),
    "csv": (TEXT, {"source": "csv", "files": ["rows.csv"]}),
    "text": (TEXT, {"source": "text", "files": ["notes.txt"], "documents": "paragraph"}),
    "parquet": (TEXT, {"source": "parquet", "files": ["t.parquet"]}),
    "mixture": (
        TEXT,
        {
            "mix": [
                {"source": "csv", "files": ["rows.csv"]},
                {"source": "python-docs"},
                {"source": "jsonl", "files": ["*.jsonl"], "alias": "lines"},
            ]
        },
    ),
    "folder": (IMAGES, {"source": "image-folder", "path": "pets", "captions": "beside"}),
    "lines of images": (IMAGES, {"source": "jsonl", "files": ["lines/p.jsonl"]}),
    "arrays in their order": (IMAGES, {"source": "arrays", "files": ["x.npy", "w.npy"]}),
}


@pytest.mark.parametrize("name", CASES)
def test_moved_files_are_the_same_source(base: Path, tmp_path: Path, name: str) -> None:
    adapter, raw = CASES[name]
    source = adapter.validate_python(raw)
    found = source_files(source, base, names_images=False)
    assert found is not None
    assert found.immovable == []
    before = source_digest(source, base)
    rows = _rows(adapter, source, base)
    move(found, tmp_path / "moved")
    shutil.rmtree(tmp_path / "home")
    raw = source.model_dump(mode="json")
    set_keys(raw, found.keys)
    moved = adapter.validate_python(raw)
    assert source_digest(moved, tmp_path / "moved") == before
    assert _rows(adapter, moved, tmp_path / "moved") == rows


def _rows(adapter: TypeAdapter[Any], source: Any, base: Path) -> list[Any]:
    if adapter is IMAGES:
        return [(item.label, item.caption, item.pixels_HWC.tolist()) for item in read_images(source, base, 0)]
    return [(row.id, row.columns) for row in read_rows(source, base, "text", 0)]


def test_absolute_paths_of_the_recipe_move_too(base: Path, tmp_path: Path) -> None:
    source = TEXT.validate_python({"source": "jsonl", "files": [str(base / "b.jsonl")]})
    found = source_files(source, Path("/nowhere"), names_images=False)
    assert found is not None
    assert list(found.files) == ["0/b.jsonl"]
    assert found.keys == {"files": ["0/b.jsonl"]}


def test_images_that_rows_name_come_along(base: Path, tmp_path: Path) -> None:
    """Each file of rows finds them where it names them, `..` and all."""
    message = {"role": "user", "content": "what is it"}
    rows = [{"messages": [message], "images": ["../pets/dog/1.png"]}, {"messages": [message], "images": ["own.png"]}]
    write_lines(base / "lines" / "chat.jsonl", rows)
    write_lines(base / "lines" / "more.jsonl", rows[:1])
    source = TEXT.validate_python({"source": "jsonl", "files": ["lines/chat.jsonl", "lines/more.jsonl"]})
    found = source_files(source, base, names_images=True)
    assert found is not None
    assert sorted(found.files) == [
        "0/lines/chat.jsonl", "0/lines/own.png", "0/pets/dog/1.png", "1/lines/more.jsonl", "1/pets/dog/1.png"
    ]  # fmt: skip
    before = image_text_digest(source, base)
    move(found, tmp_path / "moved")
    shutil.rmtree(tmp_path / "home")
    assert image_text_digest(source.model_copy(update=found.keys), tmp_path / "moved") == before


def test_an_image_named_by_an_absolute_path_cannot_move(base: Path) -> None:
    write_lines(base / "lines" / "far.jsonl", [{"image": str(base / "lines" / "own.png")}])
    source = IMAGES.validate_python({"source": "jsonl", "files": ["lines/far.jsonl"]})
    found = source_files(source, base, names_images=False)
    assert found is not None
    assert found.immovable == [str(base / "lines" / "own.png")]


def test_a_data_set_folder_moves_whole(base: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"text": "kept"}]).save_to_disk(str(base / "saved"))
    source = TEXT.validate_python({"source": "datasets", "path": "saved", "revision": "main"})
    before = source_digest(source, base)
    found = source_files(source, base, names_images=False)
    assert found is not None
    move(found, tmp_path / "moved")
    moved = source.model_copy(update=found.keys)
    assert (moved.path, moved.revision) == ("folder", None)
    assert source_digest(moved, tmp_path / "moved") == before


@pytest.mark.parametrize(
    "raw", [{"source": "python-docs"}, {"source": "datasets", "path": "org/name", "revision": "1"}]
)
def test_what_every_machine_has_does_not_move(base: Path, raw: dict[str, Any]) -> None:
    assert source_files(TEXT.validate_python(raw), base, names_images=False) is None


def test_a_missing_file_is_named(base: Path) -> None:
    source = TEXT.validate_python({"source": "jsonl", "files": ["absent.jsonl"]})
    with pytest.raises(RequestError, match=r"absent\.jsonl"):
        source_files(source, base, names_images=False)
