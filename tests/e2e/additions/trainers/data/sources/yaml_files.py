"""YAML files: a document a row."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from recipes.data.text import Yaml
from recipes.problem_codes import Code
from trainers.data.sources.local_files import file_parts, files_digest, find_sorted, require
from trainers.data.sources.reader import Part, RawRow, RowFiles, SourceError


@dataclass(frozen=True, slots=True)
class YamlReader:
    """Reads YAML files."""

    source: Yaml
    base_dir: Path
    is_remote = False

    def parts(self) -> Iterator[Part]:
        """Yield the files."""
        return file_parts(find_sorted(self.source.files, self.base_dir), lambda path, _: read_yaml(path))

    def digest(self) -> str:
        """Hash the files' bytes."""
        return files_digest(self.files().paths)

    def files(self) -> RowFiles:
        """Return the files."""
        return RowFiles(require(find_sorted(self.source.files, self.base_dir)))


def read_yaml(path: Path) -> Iterator[RawRow]:
    """Yield a row for each document."""
    for number, row in enumerate(yaml.safe_load_all(path.read_text()), start=1):
        if not isinstance(row, dict):
            raise SourceError(Code.ROWS_NOT_USABLE, f"{path}: document {number} is no mapping")
        yield RawRow(f"{path.name}:{number}", f"{path}: document {number}", row, path.parent)
