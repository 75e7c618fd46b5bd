"""What `check` accepts of files of images, training reads; what training refuses, `check` refuses alike."""

import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from tests.contract.data.agreement import FEW, damaged, idx, images_agree, json_lines, npy, parquet, text_agrees, words

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


def npz(array: np.ndarray, labels: int) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, images=array, labels=np.arange(labels), allow_pickle=True)
    return file.getvalue()


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
