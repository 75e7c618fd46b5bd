"""Data sets of the `datasets` library: local folders, and the hub."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.data.text import DatasetsPlace
from recipes.nearest import nearest
from recipes.problem_codes import Code
from trainers.data.sources.class_names import class_names, named_classes
from trainers.data.sources.local_files import files_digest
from trainers.data.sources.reader import FolderFiles, Part, RawRow, SourceError


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
        paths = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("cache-")]
        return FolderFiles(folder, sorted(paths), {"revision": None})

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
        rows, path = with_encoded_images(self._open()), self.source.path
        classes = class_names(rows.features.to_dict())
        for number, row in enumerate(rows, start=1):
            yield RawRow(f"{path}:{number}", f"{path}: row {number}", named_classes(row, classes), self._folder)

    def _open(self) -> Any:
        source, folder = self.source, self._folder
        is_on_hub = self._is_on_hub()
        if not is_on_hub and not any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
            message = "the folder was not written by datasets' save_to_disk (no dataset_dict.json or state.json)"
            raise SourceError(Code.INVALID_DATA_FORMAT, message)
        import datasets

        try:
            if is_on_hub:
                return datasets.load_dataset(source.path, source.name, split=source.split, revision=source.revision)
            loaded = datasets.load_from_disk(str(folder))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise SourceError(Code.UNREADABLE_DATA, f"data set {source.path!r} cannot be read: {error}") from None
        if not isinstance(loaded, datasets.DatasetDict):
            return loaded
        if source.split not in loaded:
            guess = nearest(source.split, list(loaded))
            suggestion = f"did you mean {guess}?" if guess else "splits there: " + ", ".join(loaded)
            raise SourceError(
                Code.UNKNOWN_SPLIT, f"the data set has no such split: {source.split}", suggestion, "split"
            )
        return loaded[source.split]


def with_encoded_images(rows: Any) -> Any:
    """Return the rows of a data set with images as encoded bytes instead of decoded ones."""
    import datasets

    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            rows = rows.cast_column(name, datasets.List(datasets.Image(decode=False)))
    return rows
