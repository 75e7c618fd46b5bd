"""What `check` accepts of rows of text, training reads; what training refuses, `check` refuses alike."""

import bz2
import csv
import gzip
import io
import json
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.contract.data.agreement import (
    FEW,
    ROLES,
    TEXT,
    damaged,
    json_lines,
    parquet,
    refusal,
    text_agrees,
    words,
)
from trainers.data.check_source import check_text
from trainers.data.row_forms import RowRole
from trainers.data.rows import read_rows

cells = st.one_of(
    st.text(max_size=6), st.sampled_from(["", " ", '"', "a,b", "\n", "\ud83d"]), st.integers(0, 9), st.none()
)
turns = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", ""]), "content": cells}))
names = st.sampled_from(["text", "label", "prompt", "completion", "chosen", "rejected", "messages", "image", " text"])
json_rows = st.dictionaries(names, cells | turns | st.lists(words, max_size=2), max_size=4)
text_rows = st.fixed_dictionaries({"prompt": words, "completion": words, "chosen": words, "rejected": words})


def table(rows: list[dict[str, str]], delimiter: str = ",", *, blank: str = "") -> bytes:
    file = io.StringIO()
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerow(f"{blank}{name}" for name in ("prompt", "completion", "chosen", "rejected"))
    writer.writerows(row.values() for row in rows)
    return file.getvalue().encode(errors="surrogatepass")


rows_of = st.lists(text_rows, max_size=30)
jsonl_files = st.lists(json_rows | text_rows, max_size=30).map(json_lines)


@FEW
@given(st.one_of(damaged(jsonl_files), damaged(jsonl_files.map(gzip.compress))), st.sampled_from(ROLES), st.booleans())
@example(b'{"prompt":"q","completion":"\\ud83d"}\n', "instructions", False)
def test_json_lines(content: bytes, role: RowRole, packed: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        name = "rows.jsonl.gz" if packed else "rows.jsonl"
        Path(folder, name).write_bytes(content)
        text_agrees(Path(folder), role, source="jsonl", files=[name])


@FEW
@given(damaged(st.lists(json_rows | text_rows, max_size=30).map(json.dumps).map(str.encode)), st.sampled_from(ROLES))
@example(b'[{"prompt":"q","completion":"\\ud83d"}]', "instructions")
@example(b'[{"text":"a"},', "text")
def test_json_arrays(content: bytes, role: RowRole) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "rows.json").write_bytes(content)
        text_agrees(Path(folder), role, source="jsonl", files=["rows.json"])


def zstandard(content: bytes) -> bytes:
    packed: bytes = pyarrow.compress(content, codec="zstd", asbytes=True)
    return packed


def zipped(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("inner/rows.jsonl", content)
        archive.writestr("__MACOSX/inner/._rows.jsonl", b"Mac OS X")
    return file.getvalue()


def tarred(content: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        member = tarfile.TarInfo("rows.jsonl")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    "rows.jsonl.bz2": bz2.compress, "rows.zst": zstandard, "rows.zip": zipped, "rows.tar.gz": tarred,
}  # fmt: skip


@FEW
@given(st.data(), st.sampled_from(sorted(PACKINGS)), st.sampled_from(ROLES))
def test_packed_files_and_archives(data: st.DataObject, name: str, role: RowRole) -> None:
    content = data.draw(damaged(jsonl_files.map(PACKINGS[name])))
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, name).write_bytes(content)
        text_agrees(Path(folder), role, source="jsonl", files=[name])


published_rows = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("instruction", "input", "output", "question", "answer", "response", "system"), cells),
        "conversations": st.lists(
            st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "bot", "?"]), "value": cells}), max_size=3
        ),
        "prompt": words,
        "answers": st.lists(st.fixed_dictionaries({"answer": words, "rank": cells}), max_size=3),
        "tools": cells,
    },
)


@FEW
@given(
    st.lists(published_rows, max_size=6).map(json_lines),
    st.sampled_from(ROLES),
    st.sampled_from([{}, {"text": "{input} {output}"}, {"prompt": "conversations[0].value", "completion": "output"}]),
)
def test_published_forms_and_columns_of_places(content: bytes, role: RowRole, columns: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "rows.jsonl").write_bytes(content)
        text_agrees(Path(folder), role, source="jsonl", files=["rows.jsonl"], columns=columns)


@FEW
@given(
    damaged(st.builds(table, rows_of, st.sampled_from([",", "\t"]), blank=st.sampled_from(["", " "]))),
    st.sampled_from(ROLES),
    st.sampled_from([{}, {"header": ["prompt", "completion"]}, {"quotes": False}, {"delimiter": "\t"}]),
)
@example(b"prompt,completion\na,b\na,b,c\na\n", "instructions", {})
@example(b'text,label\n"a ""quoted"" row",x\n"unclosed,z\n', "text", {})
@example(b"prompt, completion\nWhat?, two\n", "instructions", {"columns": {"completion": " completion"}})
def test_csv(content: bytes, role: RowRole, keys: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "rows.csv").write_bytes(content)
        text_agrees(Path(folder), role, source="csv", files=["rows.csv"], **keys)


@FEW
@given(damaged(st.lists(text_rows, max_size=30).map(parquet)), st.sampled_from(ROLES))
def test_parquet(content: bytes, role: RowRole) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "rows.parquet").write_bytes(content)
        text_agrees(Path(folder), role, source="parquet", files=["rows.parquet"])


@FEW
@given(damaged(words.map(str.encode)), st.sampled_from(ROLES), st.sampled_from(["file", "paragraph"]))
def test_plain_text(content: bytes, role: RowRole, documents: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "text.txt").write_bytes(content)
        text_agrees(Path(folder), role, source="text", files=["text.txt"], documents=documents)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", ["python-docs", "python-docs-summaries"])
def test_the_documentation(name: str, role: RowRole, tmp_path: Path) -> None:
    source = TEXT.validate_python({"source": name})
    errors = check_text(source, tmp_path, [role])  # rows of a few modules, which are not the first ones
    assert bool(errors) == bool(refusal(read_rows(source, tmp_path, role, 0)))
    assert bool(errors) == (
        role == "image_text" or (role in ("preferences", "judged", "labels") and "summaries" in name)
    )


@pytest.mark.parametrize("role", ROLES)
def test_a_data_set_folder(role: RowRole, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"prompt": ["a"] * 30, "completion": ["b"] * 30}).save_to_disk(str(tmp_path / "set"))
    assert bool(text_agrees(tmp_path, role, source="datasets", path="./set")) == (
        role in ("labels", "preferences", "judged", "image_text")
    )
    (tmp_path / "set" / "state.json").write_text("{")
    assert "cannot be read" in text_agrees(tmp_path, role, source="datasets", path="./set")
    for split, path in (("trian", "./set"), ("train", "./none"), ("train", "org/name")):
        text_agrees(tmp_path, role, source="datasets", path=path, split=split)


snapshot_rows = st.lists(
    st.fixed_dictionaries({"prompt": words}, optional={"completion": words | st.integers(0, 3), "tools": cells}),
    min_size=1,
    max_size=4,
)


@settings(FEW, max_examples=15)
@given(damaged(snapshot_rows.map(json_lines)) | snapshot_rows.map(json_lines), st.sampled_from(ROLES))
@example(b'{"prompt":"q","completion":"a"}\n{"prompt":"q","completion":3}\n', "instructions")
def test_a_folder_downloaded_from_the_hub(content: bytes, role: RowRole) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "set", "data")
        place.mkdir(parents=True)
        (place / "train.jsonl").write_bytes(content)
        text_agrees(Path(folder), role, source="datasets", path="./set")


FILTERS: list[list[dict[str, Any]]] = [
    [],
    [{"by": "duplicate"}],
    [{"by": "length", "least": 2, "of": "answer"}, {"by": "pattern", "drop": "a"}],
    [{"by": "near_duplicate", "threshold": 0.5, "ngram": 1}],
    [{"by": "contamination", "against": ["other.jsonl"], "ngram": 2}],
    [{"by": "contamination", "against": ["none.jsonl"]}],
]  # where a package is missing, both refuse the filter in the same words
few_rows = st.lists(json_rows | text_rows, max_size=6).map(json_lines)


@FEW
@given(damaged(few_rows), damaged(few_rows), st.sampled_from(ROLES), st.sampled_from(FILTERS), st.sampled_from(FILTERS))
@example(json_lines([{"prompt": "q", "completion": "a"}]), b'{"prompt": 3}\n', "instructions", [], FILTERS[1])
def test_mixtures_and_filters(
    first: bytes, second: bytes, role: RowRole, own: list[dict[str, Any]], shared: list[dict[str, Any]]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, content in (("first", first), ("second", second), ("other", second)):
            Path(folder, f"{name}.jsonl").write_bytes(content)
        sources = [{"source": "jsonl", "files": ["first.jsonl"], "filter": own or None}]
        sources.append({"source": "jsonl", "files": ["second.jsonl"]})
        text_agrees(Path(folder), role, mix=sources, filter=shared or None)
