"""Apache Parquet files."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.data.images import ImageParquet
from recipes.data.text import Parquet
from recipes.problem_codes import Code
from trainers.data.sources.class_names import class_names, named_classes
from trainers.data.sources.local_files import file_parts, files_digest, find_sorted, require
from trainers.data.sources.reader import Part, RawRow, RowFiles, SourceError

ROWS_AT_ONCE = 1000
BUFFER_BYTES = 1 << 20
"""Where only the first rows are wanted, a column is read in pieces of this size, not a row group at once."""


@dataclass(frozen=True, slots=True)
class ParquetReader:
    """Reads Parquet files."""

    source: Parquet | ImageParquet
    base_dir: Path
    is_remote = False

    def parts(self) -> Iterator[Part]:
        """Yield the files."""
        return file_parts(find_sorted(self.source.files, self.base_dir), read_parquet)

    def digest(self) -> str:
        """Hash the files' bytes, in the order of their paths."""
        return files_digest(self.files().paths)

    def files(self) -> RowFiles:
        """Return the files."""
        return RowFiles(require(find_sorted(self.source.files, self.base_dir)))


def _classes(schema: Any) -> dict[str, Sequence[str]]:
    """Return the names of classes that the `datasets` library left in a file's schema."""
    try:
        found = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        return class_names(found["info"]["features"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def read_parquet(path: Path, limit: int | None) -> Iterator[RawRow]:
    """Yield the rows of a file, or the first of them; raises SourceError."""
    with path.open("rb") as file:
        if file.read(4) != b"PAR1":
            raise SourceError(Code.INVALID_DATA_FORMAT, f"{path} is not a Parquet file")
    import pyarrow
    import pyarrow.parquet

    number, name, folder = 0, path.name, path.parent
    rows_at_once = ROWS_AT_ONCE if limit is None else min(limit, ROWS_AT_ONCE)
    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=0 if limit is None else BUFFER_BYTES) as file:
            classes = _classes(file.schema_arrow)
            for batch in file.iter_batches(batch_size=rows_at_once):
                for row in batch.to_pylist():
                    number += 1
                    yield RawRow(f"{name}:{number}", f"{path}: row {number}", named_classes(row, classes), folder)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        message = " ".join(str(error).split())[:200]
        raise SourceError(
            Code.INVALID_DATA_FORMAT, f"{path} is not readable as Parquet after row {number}: {message}"
        ) from None
