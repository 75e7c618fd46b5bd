"""Files of pictures and captions as far as their headers tell: readable, with the columns that a source reads."""

import csv
import errno
import gzip
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

from recipes.data.images import ImageDatasets, ImageJsonLines, ImageParquet
from recipes.errors import Finding
from recipes.loading.schema_paths import nearest
from recipes.problem_codes import Code

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
"""Names of files that an image folder's reader opens."""

METADATA = ("metadata.jsonl", "metadata.csv")
"""Names of the file with an image folder's captions."""

MAX_LINE_BYTES = 8 << 20


def open_file(file: Path) -> IO[bytes]:
    """Open a file, unpacked where its name ends in .gz; raises OSError for a pipe, which nobody may ever write to."""
    if not file.is_file():
        raise OSError(errno.EINVAL, "no regular file", str(file))
    return cast(IO[bytes], gzip.open(file, "rb")) if file.suffix == ".gz" else file.open("rb")


def read_idx_header(file: Path) -> Iterator[Finding]:
    """Findings of an IDX file's first bytes: two zeros, the type 8 (unsigned byte), 1 or 3 dimensions."""
    with open_file(file) as stream:
        head = stream.read(4)
    if len(head) < 4 or head[:3] != b"\x00\x00\x08" or head[3] not in (1, 3):
        message = f"{file} is not an IDX file of unsigned bytes (it starts with {head.hex() or 'nothing'})"
        yield Finding(Code.INVALID_DATA_FORMAT, message)


def read_numpy(file: Path, wanted: list[str]) -> Iterator[Finding]:
    """Findings of a NumPy file's first bytes, of an archive also the arrays that it lacks."""
    with file.open("rb") as stream:
        start = stream.read(6)
    if not start.startswith((b"\x93NUMPY", b"PK\x03\x04")):
        message = f"{file} is neither a .npy nor an .npz file"
        yield Finding(Code.INVALID_DATA_FORMAT, message, "write it with numpy.save or numpy.savez")
    elif start.startswith(b"PK"):
        try:
            with zipfile.ZipFile(file) as archive:
                names = [name.removesuffix(".npy") for name in archive.namelist()]
        except zipfile.BadZipFile as error:
            yield Finding(Code.INVALID_DATA_FORMAT, f"{file} is damaged ({error})", "write it again with numpy.savez")
            return
        for name in wanted:
            if name not in names:
                guess = nearest(name, names)
                advice = f"did you mean {guess}?" if guess else "arrays there: " + ", ".join(names[:12])
                yield Finding(Code.MISSING_COLUMN, f"{file}: no array {name!r}", advice)


def picture_columns(source: ImageJsonLines | ImageParquet | ImageDatasets) -> list[str]:
    """Columns that the source reads."""
    return [name for name in (source.image, source.label, source.caption) if name is not None]


def read_picture_lines(file: Path, wanted: list[str]) -> Iterator[Finding]:
    """Findings of the first line of a picture source."""
    with open_file(file) as stream:
        line = stream.readline(MAX_LINE_BYTES)
    try:
        row = json.loads(line or b"null")
    except (ValueError, RecursionError) as error:
        message = f"{file}:1: not JSON ({str(error)[:100]})"
        yield Finding(Code.INVALID_DATA_FORMAT, message, "one JSON object a line")
        return
    if not isinstance(row, dict):
        message = f"{file}:1: not a JSON object but {type(row).__name__}"
        yield Finding(Code.INVALID_DATA_FORMAT, message, "one JSON object a line")
        return
    yield from missing_columns(str(file), wanted, list(row))


def read_caption_file(file: Path, wanted: str) -> Iterator[Finding]:
    """Findings of a caption file's header."""
    with open_file(file) as stream:
        head = stream.readline(MAX_LINE_BYTES)
    delimiter = "\t" if file.name.removesuffix(".gz").endswith(".tsv") else ","
    try:
        (names, *_) = csv.reader([head.decode("utf-8-sig")], delimiter=delimiter)
    except (UnicodeDecodeError, csv.Error, ValueError) as error:
        message = f"{file} is not readable as CSV ({error})"
        yield Finding(Code.INVALID_DATA_FORMAT, message, "UTF-8 text with a header line")
        return
    yield from missing_columns(str(file), [wanted], [name.strip() for name in names])


def missing_columns(file: str, wanted: list[str], names: list[str]) -> Iterator[Finding]:
    """A finding for every wanted column that is not there."""
    for name in wanted:
        if name not in names:
            guess = nearest(name, names)
            advice = f"did you mean {guess}?" if guess else "columns there: " + ", ".join(names[:12])
            yield Finding(Code.MISSING_COLUMN, f"{file}: no column {name!r}", advice)
