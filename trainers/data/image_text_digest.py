"""The identity of rows with pictures: their own bytes, and those of the picture files that they name."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from recipes.data.image_files import open_file
from recipes.data.image_rows import find_pictures
from recipes.data.text import Csv, Datasets, JsonLines, Parquet, Source
from recipes.errors import RequestError
from trainers.data.files import find_files, read_file
from trainers.data.row_images import find_origin, read_picture, with_encoded_pictures
from trainers.data.sources import open_datasets, source_digest

_NAMES = ("image", "images")


def pictured_digest(source: Source, base_dir: Path) -> str:
    """Return 64 hex digits that change when the rows can change, or the files of pictures that they name."""
    digest = hashlib.sha256(source_digest(source, base_dir).encode())
    known: dict[Path, bytes] = {}
    for row, folder, place in _naming_rows(source, base_dir):
        for picture in find_pictures(row, getattr(source, "columns", {})) or ():
            origin = find_origin(picture, folder, place)
            if isinstance(origin, Path):
                if origin not in known:
                    known[origin] = hashlib.sha256(read_picture(origin, place)).digest()
                digest.update(known[origin])
    return digest.hexdigest()


def named_files(source: Source, path: Path) -> list[str]:
    """Return the files of pictures that the rows of one file name, as they name them."""
    return _file_names(source, _rows_of_file(source, path))


def named_in_dataset(source: Datasets, base_dir: Path) -> list[str]:
    """Return the files of pictures that the rows of a local data set name, as they name them."""
    return _file_names(source, ((row, place) for row, _, place in _naming_rows(source, base_dir)))


def _file_names(source: Source, rows: Iterable[tuple[dict[str, Any], str]]) -> list[str]:
    found: dict[str, None] = {}
    for row, place in rows:
        for picture in find_pictures(row, getattr(source, "columns", {})) or ():
            origin = find_origin(picture, Path(), place)
            if isinstance(origin, Path):
                found[str(origin)] = None
    return list(found)


def _naming_rows(source: Source, base_dir: Path) -> Iterator[tuple[dict[str, Any], Path, str]]:
    """Yield the rows that may name pictures, with the folder that paths start at."""
    match source:
        case JsonLines() | Csv() | Parquet():
            for path in find_files(source.files, base_dir):
                for row, place in _rows_of_file(source, path):
                    yield row, path.parent, place
        case Datasets():
            rows = with_encoded_pictures(open_datasets(source, base_dir))
            for number, row in enumerate(rows, start=1):
                yield row, base_dir / source.path, f"{source.path}: row {number}"
        case _:
            return


def _rows_of_file(source: Source, path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the rows of a file that may name pictures, with their place in words."""
    match source:
        case JsonLines():
            keys = [json.dumps(name)[:-1].encode() for name in (*_NAMES, *source.columns.values())]
            with open_file(path) as lines:
                for number, line in enumerate(lines, start=1):
                    if any(key in line for key in keys):
                        place = f"{path}: row {number}"
                        yield _json_row(line, place), place
        case Csv() | Parquet():
            for name, row in read_file(source, path):
                yield row, f"{path}: row {name.rpartition(':')[2]}"
        case _:
            return


def _json_row(line: bytes, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{place}: not JSON: {error}") from None
    return row if isinstance(row, dict) else {}
