"""What `check` accepts, training reads; what training refuses in the first rows, `check` refuses in the same words."""

import bz2
import csv
import gzip
import io
import json
import struct
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import TypeAdapter

from launch.checks.preflight import check
from recipes.data.images import ImageSource
from recipes.data.text import Source
from trainers.data.check_source import CHECKED_ROWS, check_images, check_text
from trainers.data.images import OneShape, open_image, read_images
from trainers.data.row_forms import RowRole
from trainers.data.rows import Row, read_rows
from trainers.data.sources.reader import SourceError

TEXT: TypeAdapter[Any] = TypeAdapter(Source)
IMAGES: TypeAdapter[Any] = TypeAdapter(ImageSource)
ROLES: list[RowRole] = ["text", "labels", "instructions", "seq2seq", "preferences", "judged", "prompts", "image_text"]
FEW = settings(suppress_health_check=list(HealthCheck))


def agree(errors: list[SourceError], rows: Iterator[Any]) -> str:
    """Compare what check says with reading as training does; returns what reading says, nothing where it reads."""
    said = refusal(rows)
    if said:
        assert said in [str(error) for error in errors]
    else:
        assert all("no rows" in error.message or "no row has" in error.message for error in errors)
    return said


def refusal(rows: Iterator[Any]) -> str:
    """Read the first rows; returns why they are refused, nothing where they are not."""
    try:
        list(islice(rows, CHECKED_ROWS))
    except SourceError as error:
        return str(error)
    return ""


def decoded(rows: Iterator[Row]) -> Iterator[Row]:
    """Decode the images of rows, as the processor of a model does."""
    for row in rows:
        for image in row.columns.get("images", ()):
            open_image(image.read(), image.name)
        yield row


def text_agrees(folder: Path, role: RowRole, **keys: Any) -> str:
    source = TEXT.validate_python(keys)
    return agree(check_text(source, folder, [role]), decoded(read_rows(source, folder, role, 0)))


def images_agree(folder: Path, **keys: Any) -> str:
    source, one_shape = IMAGES.validate_python(keys), OneShape()
    return agree(check_images(source, folder), map(one_shape.require, read_images(source, folder, 0)))


# Files of rows

cells = st.one_of(
    st.text(max_size=6), st.sampled_from(["", " ", '"', "a,b", "\n", "\ud83d"]), st.integers(0, 9), st.none()
)
words = st.text(st.characters(codec="utf-8"), max_size=6)
turns = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", ""]), "content": cells}))
names = st.sampled_from(["text", "label", "prompt", "completion", "chosen", "rejected", "messages", "image", " text"])
json_rows = st.dictionaries(names, cells | turns | st.lists(words, max_size=2), max_size=4)
text_rows = st.fixed_dictionaries({"prompt": words, "completion": words, "chosen": words, "rejected": words})


def json_lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(rows: list[dict[str, str]], delimiter: str = ",", *, blank: str = "") -> bytes:
    file = io.StringIO()
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerow(f"{blank}{name}" for name in ("prompt", "completion", "chosen", "rejected"))
    writer.writerows(row.values() for row in rows)
    return file.getvalue().encode(errors="surrogatepass")


def parquet(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


@st.composite
def damaged(draw: st.DrawFn, files: st.SearchStrategy[bytes]) -> bytes:
    """A file as it was written, or cut off, or with a piece of it replaced."""
    content = draw(files)
    if draw(st.booleans()):
        return content
    start, length = draw(st.integers(0, len(content))), draw(st.integers(0, 40))
    replaced = draw(st.binary(max_size=8) | st.sampled_from([b"", b'"', b",", b"\n", b"\xff", b"\x00"]))
    return content[:start] + replaced + (b"" if draw(st.booleans()) else content[start + length :])


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


# Files of images

shapes = st.sampled_from([(3, 4, 4), (25, 2, 2), (0, 4, 4), (2, 4, 4, 1), (2, 4, 4, 3), (2, 4, 4, 5), (3,), (2, 2)])


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    shape = draw(shapes)
    dtype = draw(st.sampled_from(["u1", "i4", "f4", "f8", "O", "U3"]))
    if dtype in ("O", "U3"):
        return np.full(shape, "a", dtype=dtype)
    value = draw(st.sampled_from([0, 1, 200, 300, -1, np.nan] if dtype[0] == "f" else [0, 1, 200]))
    found = np.full(shape, value, dtype=dtype)
    return np.asfortranarray(found * 2) if draw(st.booleans()) and dtype == "i4" else found


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def npz(array: np.ndarray, labels: int) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, images=array, labels=np.arange(labels), allow_pickle=True)
    return file.getvalue()


def idx(array: np.ndarray, kind: int = 8) -> bytes:
    return bytes([0, 0, kind, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + bytes(array.size)


@FEW
@given(damaged(arrays().map(npy)))
@example(npy(np.zeros((2, 4, 4, 5), np.uint8)))
@example(npy(np.full((2, 4, 4), 300)))
def test_an_array_file(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "a.npy").write_bytes(content)
        images_agree(Path(folder), source="arrays", files=["a.npy"])


@FEW
@given(damaged(st.builds(npz, arrays(), st.integers(0, 3))), st.sampled_from(["images", "labels", "other"]))
def test_an_archive_of_arrays(content: bytes, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "a.npz").write_bytes(content)
        Path(folder, "a.csv").write_text("caption\na\nb\n")
        images_agree(Path(folder), source="arrays", files=["a.npz"], images=name, labels="labels")
        images_agree(Path(folder), source="arrays", files=["a.npz"], caption_files=["a.csv"])


@FEW
@given(
    damaged(st.builds(idx, shapes.map(np.zeros), st.sampled_from([8, 13]))),
    damaged(st.sampled_from([2, 3, 25]).map(lambda count: idx(np.zeros(count)))),
)
@example(idx(np.zeros(3)), idx(np.zeros(3)))
@example(idx(np.zeros((2, 2, 2)), 13), idx(np.zeros(2)))
def test_idx_files(images: bytes, labels: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "images").write_bytes(images)
        Path(folder, "labels").write_bytes(labels)
        images_agree(Path(folder), source="idx", files=["images"])
        images_agree(Path(folder), source="idx", files=["images"], label_files=["labels"])


@st.composite
def images(draw: st.DrawFn) -> bytes:
    size = draw(st.sampled_from([(4, 4), (4, 4), (5, 4)]))
    image = Image.new(draw(st.sampled_from(["L", "L", "RGB", "I;16", "1"])), size)
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


CAPTIONS: dict[str, dict[str, Any]] = {
    "none": {}, "beside": {"captions": "beside"}, "metadata": {"captions": "metadata"}, "flat": {"labels": "none"},
}  # fmt: skip


@FEW
@given(st.lists(damaged(images()), max_size=3), damaged(words.map(str.encode)), st.sampled_from(sorted(CAPTIONS)))
def test_a_folder_of_images(contents: list[bytes], caption: bytes, captions: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "images") if captions == "flat" else Path(folder, "images", "a")
        place.mkdir(parents=True)
        for number, content in enumerate(contents):
            (place / f"{number}.png").write_bytes(content)
        (place / "0.txt").write_bytes(caption)
        rows = [{"file_name": "a/0.png", "text": caption.decode(errors="ignore")}]
        Path(folder, "images", "metadata.jsonl").write_bytes(json_lines(rows))
        images_agree(Path(folder), source="image-folder", path="images", **CAPTIONS[captions])


@FEW
@given(
    st.lists(damaged(images()), max_size=3),
    st.sampled_from([parquet, json_lines]),
    st.sampled_from([{}, {"label": "label"}, {"caption": "words"}, {"image": "other"}, {"size": 4, "channels": 1}]),
)
def test_rows_of_images(contents: list[bytes], write: Callable[[list[Any]], bytes], keys: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        kind = "parquet" if write is parquet else "jsonl"
        rows: list[dict[str, Any]] = []
        for number, content in enumerate(contents):
            Path(folder, f"{number}.png").write_bytes(content)
            image: Any = {"bytes": content} if kind == "parquet" else f"{number}.png"
            rows.append({"image": image, "label": number, "words": "a" if number else None})
        Path(folder, "rows").write_bytes(write(rows))
        images_agree(Path(folder), source=kind, files=["rows"], **keys)
        if kind == "jsonl":
            Path(folder, "rows").write_bytes(json_lines([{"prompt": "a", "completion": "b", **row} for row in rows]))
            text_agrees(Path(folder), "image_text", source=kind, files=["rows"])


# Through the command

RECIPE = """\
name: data
stages:
  base:
    kind: pretrain
    architecture: {family: decoder, type: llama, num_hidden_layers: 1, hidden_size: 32, intermediate_size: 64,
                   num_attention_heads: 2, max_position_embeddings: 64}
    tokenizer: {train: bpe, vocab_size: 320}
    data: {DATA}
    train: {steps: 2, global_batch: 2, sequence_length: 32, optimizer: {lr: 1e-3}}
"""
DRAWING = """\
name: images
stages:
  vae:
    kind: pretrain
    architecture: {family: vae}
    data: {DATA}
    train: {steps: 2, global_batch: 2, optimizer: {lr: 1e-3}}
"""
FILES: list[tuple[str, bytes, str, str, str]] = [
    (RECIPE, b"prompt, completion\nWhat?, two\n", "source: csv", "", ""),
    (RECIPE, b"prompt, completion\nWhat?, two\n", "source: csv, columns: {completion: ' completion'}", "files.0",
     "no column ' completion' (mapped to completion)"),
    (RECIPE, b"prompt,completion\na,b\na,b,c\n", "source: csv", "files.0", "row 2 (line 3) has 3 cells, the header 2"),
    (RECIPE, b'text,label\na,x\n"unclosed,z\n', "source: csv", "files.0", "row 2 (line 3): unexpected end of data"),
    (RECIPE, b'{"prompt":"q","completion":"\\ud83d"}\n', "source: jsonl", "files.0", ":1: not JSON"),
    (DRAWING, idx(np.zeros(3)), "source: idx", "files.0", "is not an IDX file of unsigned bytes with 3 dimensions"),
    (DRAWING, npy(np.zeros((2, 4, 4, 5), np.uint8)), "source: arrays", "files.0", "an array of shape (4, 4, 5)"),
    (DRAWING, npy(np.full((2, 4, 4), 300)), "source: arrays", "files.0", "pixels from 0 to 300"),
]  # fmt: skip


@pytest.mark.parametrize(("recipe", "content", "keys", "field", "said"), FILES)
def test_the_command_says_what_the_reader_says(
    tmp_path: Path, recipe: str, content: bytes, keys: str, field: str, said: str
) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe.replace("{DATA}", f"{{{keys}, files: [rows.file]}}"))
    (tmp_path / "rows.file").write_bytes(content)
    found = check(tmp_path / "recipe.yaml")
    assert found.exit_code == (2 if said else 0), found.problems
    if said:
        (problem,) = found.problems
        assert problem.field.endswith(f".data.{field}")
        assert problem.line is not None
        assert str(tmp_path / "rows.file") in problem.message
        assert said in problem.message
