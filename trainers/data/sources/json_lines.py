"""Files with one JSON object a line, or with one array of objects."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from recipes.data.images import ImageJsonLines
from recipes.data.text import JsonLines
from recipes.problem_codes import Code
from trainers.data.sources.local_files import (
    file_parts,
    files_digest,
    find_sorted,
    naming_file,
    open_text,
    require,
)
from trainers.data.sources.reader import Part, RawRow, RowFiles, SourceError, reason

MAX_LINE_CHARACTERS = 2**27
PIECE_CHARACTERS = 2**16
_BLANKS = re.compile(r"\s*")
_BETWEEN = re.compile(r"\s*(?:,\s*)?")
ONE_OBJECT = "one JSON object a line"


@dataclass(frozen=True, slots=True)
class JsonLinesReader:
    """Reads JSON lines."""

    source: JsonLines | ImageJsonLines
    base_dir: Path
    image_column: str | None = None
    """Column of images that may name files, which then are part of the data."""
    is_remote = False

    def parts(self) -> Iterator[Part]:
        """Yield the files."""
        read = self._read_images if self.image_column is not None else lambda path, _: read_json_lines(path)
        return file_parts(find_sorted(self.source.files, self.base_dir), read)

    def digest(self) -> str:
        """Hash the files' bytes, in the order of their paths, and those of the images that rows name."""
        files = self.files()
        named = (path.parent / name for path in files.paths for name in files.named.get(path, ()))
        return files_digest([*files.paths, *named])

    def files(self) -> RowFiles:
        """Return the files, and the images that their rows name."""
        paths = require(find_sorted(self.source.files, self.base_dir))
        if self.image_column is None:
            return RowFiles(paths)
        return RowFiles(paths, {path: self._named_images(path) for path in paths})

    def _read_images(self, path: Path, limit: int | None) -> Iterator[RawRow]:
        assert self.image_column is not None
        for row in read_json_lines(path):
            if isinstance(name := row.columns.get(self.image_column), str):
                row.columns[self.image_column] = _image_bytes(path.parent / name, row.place)
            yield row

    def _named_images(self, path: Path) -> list[str]:
        assert self.image_column is not None
        with naming_file(path):
            named = [row.columns.get(self.image_column) for row in read_json_lines(path)]
        return [name for name in named if isinstance(name, str) and (path.parent / name).is_file()]


def read_json_lines(path: Path) -> Iterator[RawRow]:
    """Yield the rows of a file of lines or of one array; raises SourceError naming the place, OSError and EOFError."""
    name, whole, folder = path.name, str(path), path.parent
    with open_text(path) as file:
        if _is_array(file):
            for number, row in enumerate(read_array(file, path), start=1):
                yield RawRow(f"{name}:{number}", f"{path}: item {number}", row, folder)
            return
    with open_text(path) as file:
        number = 0
        while line := file.readline(MAX_LINE_CHARACTERS + 1):
            number += 1
            place = f"{whole}:{number}"
            if len(line) > MAX_LINE_CHARACTERS:
                raise SourceError(
                    Code.INVALID_DATA_FORMAT,
                    f"{place}: the line is longer than {MAX_LINE_CHARACTERS} characters",
                    ONE_OBJECT,
                )
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if "\\u" in line and "\\ud" in line.lower():  # half of a surrogate pair is valid JSON, but no text
                    json.dumps(row, ensure_ascii=False).encode()
            except (ValueError, RecursionError) as error:
                raise SourceError(
                    Code.INVALID_DATA_FORMAT, f"{place}: not JSON ({str(error)[:100]})", ONE_OBJECT
                ) from None
            if not isinstance(row, dict):
                raise SourceError(
                    Code.INVALID_DATA_FORMAT, f"{place}: not a JSON object but {type(row).__name__}", ONE_OBJECT
                )
            yield RawRow(f"{name}:{number}", place, row, folder)


def _is_array(file: TextIO) -> bool:
    """Tell whether a file is an array of objects: it starts with [ and, on this line or the next, {."""
    first = file.readline(MAX_LINE_CHARACTERS).lstrip()
    while first == "" and (line := file.readline(MAX_LINE_CHARACTERS)):
        first = line.lstrip()
    if not first.startswith("["):
        return False
    rest = first[1:].lstrip()
    while rest == "" and (line := file.readline(MAX_LINE_CHARACTERS)):
        rest = line.lstrip()
    file.seek(0)
    return rest.startswith(("{", "]"))


def read_array(file: TextIO, path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON array, a piece of the file in memory at a time; raises SourceError."""
    decoder, number, size = json.JSONDecoder(), 0, PIECE_CHARACTERS
    text = file.read(size).lstrip()
    place = 1
    while True:
        match = (_BETWEEN if number else _BLANKS).match(text, place)
        start = place if match is None else match.end()
        if text.startswith("]", start):
            if (text[start + 1 :] + file.read(size)).strip():
                raise _no_array(path, number, "there is something after the array")
            return
        try:
            row, end = decoder.raw_decode(text, start)
            if "\\ud" in text[start:end].lower():  # half of a surrogate pair is valid JSON, but no text
                json.dumps(row, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            piece = file.read(size)
            if not piece:
                raise _no_array(path, number, str(error)[:100]) from None
            text, place, size = text[place:] + piece, 0, size * 2
            continue
        if not isinstance(row, dict):
            raise _no_array(path, number, f"not a JSON object but {type(row).__name__}")
        number, place, size = number + 1, end, PIECE_CHARACTERS
        yield row


def _no_array(path: Path, number: int, why: str) -> SourceError:
    place = f"{path}: item {number + 1}"
    return SourceError(Code.INVALID_DATA_FORMAT, f"{place}: {why}", f"{ONE_OBJECT}, or one array of objects")


def _image_bytes(path: Path, place: str) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise SourceError(Code.UNREADABLE_IMAGE, f"{place}: image {path} cannot be read: {reason(error)}") from None
