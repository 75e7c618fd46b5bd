"""Data sets of the `datasets` library: local folders, and the hub."""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.data.text import DatasetsPlace
from recipes.nearest import nearest
from recipes.problem_codes import Code
from trainers.data.sources.class_names import class_names, named_classes
from trainers.data.sources.local_files import files_digest, is_hidden
from trainers.data.sources.reader import FolderFiles, Part, RawRow, SourceError

SNAPSHOT_SUFFIXES = (
    ".parquet",
    ".jsonl",
    ".json",
    ".csv",
    ".tsv",
    ".txt",
    ".jsonl.gz",
    ".json.gz",
    ".csv.gz",
    ".jsonl.zst",
)
"""Files that a folder downloaded from the hub keeps its rows in."""
_SPLIT_NAME = re.compile(r"[\[+]")


@dataclass(frozen=True, slots=True)
class DatasetsReader:
    """Reads a data set through the `datasets` library; encoded images stay encoded."""

    source: DatasetsPlace
    base_dir: Path

    @property
    def is_remote(self) -> bool:
        """Whether it is no local folder."""
        return not self._folder.is_dir()

    def parts(self) -> Iterator[Part]:
        """Yield the split."""
        yield Part("path", self._read)

    def digest(self) -> str:
        """Hash the files of the folder with their names, or the hub's id and revision."""
        files = self.files()
        if files is None:
            identity: list[Any] = ["hub", self.source.path, self.source.revision]
        else:
            names = [path.relative_to(files.folder).as_posix() for path in files.paths]
            identity = ["folder", names, files_digest(files.paths)]
        return hashlib.sha256(json.dumps([*identity, self.source.name, self.source.split]).encode()).hexdigest()

    def files(self) -> FolderFiles | None:
        """Return the files of the local folder; None for a data set of the hub."""
        if self._is_on_hub():
            return None
        folder = self._folder
        paths = [path for path in folder.rglob("*") if path.is_file() and not self._is_aside(path)]
        return FolderFiles(folder, sorted(paths), {"revision": None})

    def _is_aside(self, path: Path) -> bool:
        """Tell whether a file is a cache, or hidden (as a download leaves them), and no part of the data."""
        return path.name.startswith("cache-") or any(map(is_hidden, path.relative_to(self._folder).parts))

    @property
    def _folder(self) -> Path:
        return self.base_dir / self.source.path

    def _is_on_hub(self) -> bool:
        """Tell whether it is a hub id; raises SourceError for one without a revision, and for a missing folder."""
        if self._folder.is_dir():
            return False
        if self.source.path.startswith((".", "/")):
            raise SourceError(Code.MISSING_FOLDER, "there is no such folder", f"looked for {self._folder}", "path")
        if self.source.revision is None:
            message = f"{self.source.path!r} is no folder in {self.base_dir}; a hub data set needs its `revision`"
            raise SourceError(
                Code.MISSING_REVISION, message, "give the commit hash, or a local folder as ./folder", "path"
            )
        return True

    def _read(self, limit: int | None) -> Iterator[RawRow]:
        rows, path = with_encoded_images(self._open(limit)), self.source.path
        classes = class_names((rows.features or {}) and rows.features.to_dict())
        for number, row in enumerate(rows, start=1):
            yield RawRow(f"{path}:{number}", f"{path}: row {number}", named_classes(row, classes), self._folder)

    def _open(self, limit: int | None) -> Any:
        source, folder = self.source, self._folder
        is_on_hub = self._is_on_hub()
        is_saved = any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))
        if not is_on_hub and not is_saved and not _is_snapshot(folder):
            message = "the folder holds no data set: neither what save_to_disk writes (dataset_dict.json or state.json)"
            raise SourceError(
                Code.INVALID_DATA_FORMAT, f"{message} nor files ending in {' '.join(SNAPSHOT_SUFFIXES)}", field="path"
            )
        import datasets

        try:
            if is_on_hub:
                return datasets.load_dataset(source.path, source.name, split=source.split, revision=source.revision)
            if is_saved:
                return _take(datasets.load_from_disk(str(folder)), source.split)
            is_first = limit is not None and source.split.isidentifier()
            return datasets.load_dataset(str(folder), source.name, split=source.split, streaming=is_first)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, datasets.exceptions.DatasetsError) as error:
            raise SourceError(Code.UNREADABLE_DATA, f"data set {source.path!r} cannot be read: {error}") from None


def _is_snapshot(folder: Path) -> bool:
    """Tell whether a folder holds files of data, as a download from the hub does."""
    paths = (path for path in folder.rglob("*") if not any(map(is_hidden, path.relative_to(folder).parts)))
    return any(path.name.endswith(SNAPSHOT_SUFFIXES) for path in paths)


def _take(loaded: Any, split: str) -> Any:
    """Return a split of a saved data set, a part of one (`train[:10%]`), or several (`train+test`)."""
    import datasets

    parts = loaded if isinstance(loaded, datasets.DatasetDict) else {_SPLIT_NAME.split(split)[0]: loaded}
    unknown = [name for name in (_SPLIT_NAME.split(piece)[0] for piece in split.split("+")) if name not in parts]
    if unknown:
        guess = nearest(unknown[0], list(parts))
        suggestion = f"did you mean {guess}?" if guess else "splits there: " + ", ".join(parts)
        raise SourceError(Code.UNKNOWN_SPLIT, f"the data set has no such split: {unknown[0]}", suggestion, "split")
    if split in parts:
        return parts[split]
    sizes = {name: len(part) for name, part in parts.items()}
    try:
        wanted = datasets.ReadInstruction.from_spec(split).to_absolute(sizes)
    except (ValueError, AssertionError) as error:
        message = f"{split} is no split: {error}"
        raise SourceError(Code.UNKNOWN_SPLIT, message, "for example train[:10%]", "split") from None
    pieces = [parts[part.splitname].select(range(part.from_, part.to)) for part in wanted]
    return pieces[0] if len(pieces) == 1 else datasets.concatenate_datasets(pieces)


def with_encoded_images(rows: Any) -> Any:
    """Return the rows of a data set with images as encoded bytes instead of decoded ones."""
    import datasets

    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            rows = rows.cast_column(name, datasets.List(datasets.Image(decode=False)))
    return rows
