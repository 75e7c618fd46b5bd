"""Compares `check` with the training reader, and writes files whole and damaged."""

import io
import json
import struct
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

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


words = st.text(st.characters(codec="utf-8"), max_size=6)


def json_lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


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


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def idx(array: np.ndarray, kind: int = 8) -> bytes:
    return bytes([0, 0, kind, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + bytes(array.size)
