"""Files with one JSON object a line."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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
    """Yield the rows of a file; raises SourceError naming file and line, OSError and EOFError."""
    name, whole, folder = path.name, str(path), path.parent
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


def _image_bytes(path: Path, place: str) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise SourceError(Code.UNREADABLE_IMAGE, f"{place}: image {path} cannot be read: {reason(error)}") from None
