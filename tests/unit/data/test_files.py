"""How files come: packed, as JSON arrays, in UTF-16, with hidden ones among them, with brackets in their names."""

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from pydantic import TypeAdapter

from recipes.data.text import Source
from trainers.data.rows import read_rows
from trainers.data.sources import json_lines
from trainers.data.sources.reader import SourceError

SOURCE: TypeAdapter[Any] = TypeAdapter(Source)
ROWS = [{"text": f"row {number} ü"} for number in range(5)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def zstandard(content: bytes) -> bytes:
    packed: bytes = pyarrow.compress(content, codec="zstd", asbytes=True)
    return packed


def read(folder: Path, *files: str, **keys: Any) -> list[dict[str, Any]]:
    source = SOURCE.validate_python({"source": "jsonl", "files": list(files), **keys})
    return [row.columns for row in read_rows(source, folder, "text", 0)]


@pytest.mark.parametrize("name", ["rows.jsonl.packed", "rows"])
@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, zstandard])
def test_packed_files_are_told_by_their_first_bytes(tmp_path: Path, pack: Any, name: str) -> None:
    (tmp_path / name).write_bytes(pack(LINES.encode()))
    assert read(tmp_path, name) == ROWS


def test_a_packed_file_that_is_cut_off_or_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cut.zst").write_bytes(zstandard(LINES.encode() * 9)[:-9])
    with pytest.raises(SourceError, match=r"cut.zst.* cannot be read"):
        read(tmp_path, "cut.zst")
    (tmp_path / "latin.zst").write_bytes(zstandard('{"text": "a"}\n{"text": "ü"}\n'.encode("latin-1")))
    with pytest.raises(SourceError, match=r"latin.zst:2 .byte 0xfc. is not UTF-8"):
        read(tmp_path, "latin.zst")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_a_byte_order_mark_says_the_encoding(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes(LINES.encode(encoding))
    assert read(tmp_path, "rows.jsonl") == ROWS


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("piece", [8, 2**16])
def test_an_array_of_objects_is_read_like_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, indent: int | None, piece: int
) -> None:
    monkeypatch.setattr(json_lines, "PIECE_CHARACTERS", piece)
    (tmp_path / "rows.json").write_text("\n" + json.dumps(ROWS, indent=indent) + "\n")
    assert read(tmp_path, "rows.json") == ROWS
    (tmp_path / "none.json").write_text("[]")
    assert read(tmp_path, "none.json") == []


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ('[{"text": "a"}, {"text": ]', r"rows.json: item 2: Expecting value"),
        ('[{"text": "a"}, 3]', r"rows.json: item 2: not a JSON object but int"),
        ('[{"text": "a"}] x', r"rows.json: item 2: there is something after the array"),
        ('[{"text": "\\ud83d"}]', r"rows.json: item 1: 'utf-8' codec can't encode"),
    ],
)
def test_what_is_wrong_in_an_array_is_named_by_its_item(tmp_path: Path, content: str, complaint: str) -> None:
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(SourceError, match=complaint):
        read(tmp_path, "rows.json")


def test_a_file_whose_name_holds_brackets_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "rows [1].jsonl").write_text(LINES)
    assert read(tmp_path, "rows [1].jsonl") == ROWS


def test_patterns_pass_over_hidden_files(tmp_path: Path) -> None:
    for name in ("a/rows.jsonl", "a/._rows.jsonl", "a/.ipynb_checkpoints/rows.jsonl", "__MACOSX/a/rows.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(LINES)
    assert read(tmp_path, "**/*.jsonl") == ROWS
    assert read(tmp_path, "a/.ipynb_checkpoints/*.jsonl") == ROWS


def test_classes_keep_their_names(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    rows = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    rows.save_to_disk(str(tmp_path / "set"))
    rows.to_parquet(str(tmp_path / "rows.parquet"))
    for keys in ({"source": "datasets", "path": "./set"}, {"source": "parquet", "files": ["rows.parquet"]}):
        read_labels = read_rows(SOURCE.validate_python(keys), tmp_path, "labels", 0)
        assert [row.columns["label"] for row in read_labels] == ["pos", "neg", None]
