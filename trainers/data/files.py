"""Local data files: text, JSON lines, CSV and Parquet, row by row, with errors that name file and row."""

import csv
import gzip
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from recipes.data.files import csv_dialect, match_files
from recipes.data.text import Csv, JsonLines, Parquet, TextFiles
from recipes.errors import RequestError

FileSource = TextFiles | JsonLines | Csv | Parquet
MAX_FIELD_CHARACTERS = 2**27
HEAD_CHARACTERS = 2**16


def find_files(patterns: list[str], base_dir: Path) -> list[Path]:
    """Return the files that patterns name, each once, sorted; raises RequestError for a missing one."""
    return sorted(set(files_in_order(patterns, base_dir)), key=lambda path: path.as_posix())


def files_in_order(patterns: list[str], base_dir: Path) -> list[Path]:
    """Return the files of each pattern in turn; raises RequestError for a missing one."""
    found: list[Path] = []
    for pattern in patterns:
        named = match_files(pattern, base_dir)
        matches = [path for path in named if path.is_file()]
        if not matches:
            kind = "is a folder" if named else "does not exist"
            raise RequestError(f"data file {pattern!r} {kind} (looked in {base_dir})")
        found += matches
    return found


def files_digest(paths: list[Path]) -> str:
    """Return 64 hex digits over the files' bytes in order."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def read_file(source: FileSource, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (row id, row) of one file; the id is the file's name with line, row or paragraph number."""
    try:
        match source:
            case TextFiles():
                yield from _read_text(path, source.documents)
            case JsonLines():
                yield from read_json_lines(path)
            case Csv():
                yield from read_csv(path, source)
            case Parquet():
                yield from read_parquet(path)
    except UnicodeDecodeError as error:
        raise RequestError(f"{path}: not UTF-8 at byte {error.start}") from None
    except (OSError, EOFError) as error:
        raise RequestError(f"{path}: {error}") from None


def _open(path: Path) -> TextIO:
    """Open text, unpacked where the name ends in .gz; a byte order mark is passed over."""
    if path.suffix == ".gz":
        return io.TextIOWrapper(gzip.open(path, "rb"), encoding="utf-8-sig", newline="")
    return open(path, encoding="utf-8-sig", newline="")


def read_text_head(path: Path, documents: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the documents of a text file's first characters, the last one cut."""
    try:
        yield from _read_text(path, documents, HEAD_CHARACTERS)
    except UnicodeDecodeError as error:
        raise RequestError(f"{path}: not UTF-8 at byte {error.start}") from None
    except (OSError, EOFError) as error:
        raise RequestError(f"{path}: {error}") from None


def _read_text(path: Path, documents: str, characters: int = -1) -> Iterator[tuple[str, dict[str, Any]]]:
    with _open(path) as file:
        text = file.read(characters).replace("\r\n", "\n")
    if documents == "file":
        yield path.name, {"text": text}
        return
    blocks = (block.strip("\n") for block in text.split("\n\n"))
    for number, block in enumerate((block for block in blocks if block.strip()), start=1):
        yield f"{path.name}:{number}", {"text": block}


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (row id, row) of a file with one JSON object a line."""
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if "\\ud" in line.lower():  # half of a surrogate pair is valid JSON, but no text
                    json.dumps(row, ensure_ascii=False).encode()
            except (ValueError, RecursionError) as error:
                raise RequestError(f"{path}:{number}: not JSON: {error}") from None
            if not isinstance(row, dict):
                raise RequestError(f"{path}:{number}: a {type(row).__name__}, not an object")
            yield f"{path.name}:{number}", row


def read_csv(path: Path, source: Csv | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (row id, row) of a CSV file as its source says; without one, of a TSV file by its name."""
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    with _open(path) as file:
        reader = csv.reader(file, **csv_dialect(source, path), strict=True)
        header = None if source is None else source.header
        number = 0
        try:
            for cells in reader:
                if header is None:
                    header = [name.strip() for name in cells]
                    if len(set(header)) != len(header):
                        raise RequestError(f"{path}: a column name stands twice in the header")
                    continue
                if not cells:
                    continue
                number += 1
                if len(cells) != len(header):
                    found = f"{len(cells)} cells, the header {len(header)}"
                    raise RequestError(f"{path}: row {number} (line {reader.line_num}) has {found}")
                yield f"{path.name}:{number}", dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise RequestError(f"{path}: row {number + 1} (line {reader.line_num}): {error}") from None
        if header is None:
            raise RequestError(f"{path}: no header line")


def read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (row id, row) of a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path.name}:{number}", row
    except pyarrow.ArrowException as error:
        raise RequestError(f"{path}: not readable as Parquet: {error}") from None
