"""Comma- and tab-separated files."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from recipes.data.text import Csv
from recipes.problem_codes import Code
from trainers.data.sources.local_files import file_parts, files_digest, find_sorted, open_text, require
from trainers.data.sources.reader import Part, RawRow, RowFiles, SourceError

MAX_FIELD_CHARACTERS = 2**27
TRIED_ROWS = 200_000
"""By which it is told whether a tab-separated file has quotes."""


@dataclass(frozen=True, slots=True)
class CsvReader:
    """Reads CSV and TSV files."""

    source: Csv
    base_dir: Path
    is_remote = False

    def parts(self) -> Iterator[Part]:
        """Yield the files."""
        return file_parts(find_sorted(self.source.files, self.base_dir), lambda path, _: read_csv(path, self.source))

    def digest(self) -> str:
        """Hash the files' bytes, in the order of their paths."""
        return files_digest(self.files().paths)

    def files(self) -> RowFiles:
        """Return the files."""
        return RowFiles(require(find_sorted(self.source.files, self.base_dir)))


def read_csv(path: Path, source: Csv | None = None) -> Iterator[RawRow]:
    """Yield the rows of a CSV file as its source says; without one, of a TSV file by its name.

    Blanks around the names of a header line do not count. Raises SourceError naming file, row and line, OSError and
    EOFError.
    """
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    header = None if source is None else source.header
    name, folder = path.name, path.parent
    number, dialect, form = 0, _dialect(source, path), ""
    if dialect == {"delimiter": "\t", "quoting": csv.QUOTE_MINIMAL} and _has_plain_quotes(path):
        dialect["quoting"], form = csv.QUOTE_NONE, "tab-separated cells with quotes as characters"
    with open_text(path) as file:
        reader = csv.reader(file, **dialect, strict=True)
        try:
            for cells in reader:
                if header is None:
                    header = _names(path, cells)
                    continue
                if not cells:
                    continue
                number += 1
                if len(cells) != len(header):
                    message = f"row {number} (line {reader.line_num}) has {len(cells)} cells, the header {len(header)}"
                    raise SourceError(
                        Code.CELL_COUNT_MISMATCH,
                        f"{path}: {message}",
                        "" if source is None else "set `delimiter` or `header`",
                    )
                columns = dict(zip(header, cells, strict=True))
                yield RawRow(f"{name}:{number}", f"{path}: row {number}", columns, folder, form=form)
        except csv.Error as error:
            advice = "" if source is None else "set `quotes: false` where quotes are characters like others"
            message = f"{path}: row {number + 1} (line {reader.line_num}): {error}"
            raise SourceError(Code.INVALID_DATA_FORMAT, message, advice) from None
        if header is None:
            raise SourceError(Code.EMPTY_FILE, f"{path}: no header line")


def _names(path: Path, cells: list[str]) -> list[str]:
    header = [name.strip() for name in cells]
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise SourceError(Code.DUPLICATE_ITEM, f"{path}:1: the header names {repeated[0]!r} twice")
    return header


def _dialect(source: Csv | None, path: Path) -> dict[str, Any]:
    by_name = "\t" if ".tsv" in path.suffixes[-2:] else ","
    quoting = csv.QUOTE_MINIMAL if source is None or source.quotes else csv.QUOTE_NONE
    return {"delimiter": (source and source.delimiter) or by_name, "quoting": quoting}


def _has_plain_quotes(path: Path) -> bool:
    """Tell whether the first rows of a tab-separated file are even only where quotes are characters like others."""
    about = path.stat()
    return _reads_as_plain(path, about.st_size, about.st_mtime_ns)


@lru_cache(maxsize=1024)
def _reads_as_plain(path: Path, size: int, changed_ns: int) -> bool:
    """The answer for a state of a file; `check` alone opens a file more than once."""
    return not _is_even(path, csv.QUOTE_MINIMAL) and _is_even(path, csv.QUOTE_NONE)


def _is_even(path: Path, quoting: Literal[0, 3]) -> bool:
    """Tell whether the first rows can be read and have as many cells as each other."""
    with open_text(path) as file:
        reader = csv.reader(file, delimiter="\t", quoting=quoting, strict=True)
        try:
            widths = filter(None, map(len, islice(reader, TRIED_ROWS)))
            first = next(widths, 0)
            return all(width == first for width in widths)
        except csv.Error:
            return False
