"""How files come: packed, as JSON arrays, in UTF-16, with hidden ones among them, with brackets in their names."""

import bz2
import gzip
import json
import lzma
import tarfile
import zipfile
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


@pytest.fixture(autouse=True)
def unpacked(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where archives are unpacked."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("TRAINWRIGHT_CACHE", str(cache))
    return cache / "archives"


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
        ('[{"text": "a"}] x', r"rows.json: item 2: .* after the array"),
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


def test_members_of_archives_are_files(tmp_path: Path, unpacked: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(LINES)
    assert read(tmp_path, "rows.jsonl") == ROWS
    assert not unpacked.exists()  # nothing is left behind by what has no archive
    with zipfile.ZipFile(tmp_path / "rows.zip", "w") as archive:
        for name in ("b/rows.jsonl", "a/rows.jsonl.gz", "__MACOSX/b/._rows.jsonl", "readme.txt"):
            archive.writestr(name, gzip.compress(LINES.encode()) if name.endswith("gz") else LINES)
    with tarfile.open(tmp_path / "rows.tar.bz2", "w:bz2") as archive:
        archive.add(tmp_path / "rows.zip", "rows.jsonl")
    assert read(tmp_path, "rows.zip::*/*.jsonl*") == ROWS * 2
    assert all(folder.stat().st_mode & 0o077 == 0 for folder in unpacked.iterdir())
    assert read(tmp_path, "rows.zip::b/*") == ROWS
    with pytest.raises(SourceError, match=r"rows.zip .* c/\*; .* a/rows.jsonl.gz, b/"):
        read(tmp_path, "rows.zip::c/*")
    with pytest.raises(SourceError, match=r"rows.tar.bz2/rows.jsonl:[0-9]"):  # a zip file inside, which is no text
        read(tmp_path, "rows.tar.bz2")
    with zipfile.ZipFile(tmp_path / "rows.zip", "w") as archive:
        archive.writestr("c/rows.jsonl", LINES)
    assert read(tmp_path, "rows.zip") == ROWS


@pytest.mark.parametrize("name", ["../rows.jsonl", "/rows.jsonl"])
def test_members_cannot_leave_their_archive(tmp_path: Path, name: str) -> None:
    (tmp_path / "rows.jsonl").write_text(LINES)
    with tarfile.open(tmp_path / "rows.tar", "w") as archive:
        archive.add(tmp_path / "rows.jsonl", filter=lambda member: member.replace(name=name, deep=False))
    if name.startswith("."):
        with pytest.raises(SourceError, match="cannot be unpacked"):
            read(tmp_path, "rows.tar")
    else:
        assert read(tmp_path, "rows.tar") == ROWS


def labelled(folder: Path, keys: dict[str, Any]) -> list[tuple[str, Any]]:
    rows = read_rows(SOURCE.validate_python(keys), folder, "labels", 0)
    return [(row.columns["text"], row.columns["label"]) for row in rows]


def test_the_folder_of_a_text_is_its_class(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "reviews.zip", "w") as archive:
        for name in ("neg", "pos"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "0.txt").write_text(f"a {name} one")
            archive.write(tmp_path / name / "0.txt", f"reviews/{name}/0.txt")
    expected = [("a neg one", "neg"), ("a pos one", "pos")]
    assert labelled(tmp_path, {"source": "text", "files": ["*/*.txt"], "labels": "folder"}) == expected
    assert labelled(tmp_path, {"source": "text", "files": ["reviews.zip"], "labels": "folder"}) == expected
    assert labelled(tmp_path, {"source": "text", "files": ["neg/*"]}) == [("a neg one", None)]


def test_tab_separated_cells_without_quotes_are_told_by_the_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.tsv").write_text('text\tlabel\n"Go," he said.\ta\nstay\tb\n')
    (tmp_path / "quoted.tsv").write_text('text\tlabel\n"two\tcells"\ta\n')
    many = "a\tb\n" * 3000 + '"Go," he said.\tc\n'
    (tmp_path / "late.tsv").write_text("text\tlabel\n" + many)
    assert labelled(tmp_path, {"source": "csv", "files": ["late.tsv"]})[-1] == ('"Go," he said.', "c")
    (tmp_path / "wrong.tsv").write_text('text\tlabel\n"two\ta\nthree\n')
    assert labelled(tmp_path, {"source": "csv", "files": ["rows.tsv"]}) == [('"Go," he said.', "a"), ("stay", "b")]
    assert labelled(tmp_path, {"source": "csv", "files": ["quoted.tsv"]}) == [("two\tcells", "a")]
    (row, _) = read_rows(SOURCE.validate_python({"source": "csv", "files": ["rows.tsv"]}), tmp_path, "labels", 0)
    assert row.reading.form == "tab-separated cells with quotes as characters"
    with pytest.raises(SourceError, match=r"wrong.tsv: row 1 \(line 3\)"):
        labelled(tmp_path, {"source": "csv", "files": ["wrong.tsv"]})


def test_folders_downloaded_from_the_hub_and_parts_of_splits(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), _file(tmp_path / "snapshot/data/train-0.parquet"))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS[:2]), _file(tmp_path / "snapshot/odd/part.parquet"))
    configs = [{"config_name": "other", "data_files": [{"split": "held", "path": "odd/*.parquet"}]}]
    (tmp_path / "snapshot/README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))

    def rows(**keys: Any) -> list[dict[str, Any]]:
        return [row.columns for row in read_rows(SOURCE.validate_python(keys), tmp_path, "text", 0)]

    assert rows(source="datasets", path="./snapshot", name="other", split="held") == ROWS[:2]
    (tmp_path / "snapshot/README.md").unlink()
    assert rows(source="datasets", path="./snapshot/data") == ROWS
    assert rows(source="datasets", path="./snapshot/data", split="train[:40%]") == ROWS[:2]
    assert rows(source="datasets", path="./saved", split="train[3:]") == ROWS[3:]
    with pytest.raises(SourceError, match=r"split: trian; .* train"):
        rows(source="datasets", path="./snapshot/data", split="trian")
    with pytest.raises(SourceError, match=r"train\[a\] is no split"):
        rows(source="datasets", path="./saved", split="train[a]")


def _file(path: Path) -> Path:
    path.parent.mkdir(parents=True)
    return path
