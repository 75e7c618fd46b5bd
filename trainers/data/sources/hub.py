"""Data sets of the `datasets` library: local folders, and the hub."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from recipes.data.text import DatasetsPlace
from recipes.nearest import nearest
from recipes.problem_codes import Code
from trainers.data.sources.class_names import class_names, named_classes
from trainers.data.sources.local_files import files_digest, is_hidden
from trainers.data.sources.reader import FolderFiles, Part, RawRow, SourceError
from trainers.data.sources.snapshot import SUFFIXES, has_rows, read_files, split_files

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
        if not self._is_on_hub() and not self._is_saved:
            yield from self._read_snapshot(limit)
            return
        rows, path = with_encoded_images(self._open()), self.source.path
        classes = class_names(rows.features.to_dict())
        for number, row in enumerate(rows, start=1):
            yield RawRow(f"{path}:{number}", f"{path}: row {number}", named_classes(row, classes), self._folder)

    @property
    def _is_saved(self) -> bool:
        return any((self._folder / name).is_file() for name in ("dataset_dict.json", "state.json"))

    def _read_snapshot(self, limit: int | None) -> Iterator[RawRow]:
        """Yield the rows of a folder downloaded from the hub."""
        folder, split = self._folder, self.source.split
        if not has_rows(folder):
            message = "the folder holds no data set: neither what save_to_disk writes (dataset_dict.json or state.json)"
            raise SourceError(
                Code.INVALID_DATA_FORMAT, f"{message} nor files of rows ({' '.join(SUFFIXES)})", field="path"
            )
        splits = split_files(folder, self.source.name)
        names = demand_splits(split, list(splits))
        if [split] == names:
            yield from read_files(splits[split], limit)
            return
        sizes = {name: sum(1 for _ in read_files(splits[name], None)) for name in dict.fromkeys(names)}
        for name, start, end in parts_of(split, sizes):
            yield from islice(read_files(splits[name], end), start, end)

    def _open(self) -> Any:
        source, folder = self.source, self._folder
        import datasets

        try:
            if self._is_on_hub():
                return datasets.load_dataset(source.path, source.name, split=source.split, revision=source.revision)
            return _take(datasets.load_from_disk(str(folder)), source.split)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise SourceError(Code.UNREADABLE_DATA, f"data set {source.path!r} cannot be read: {error}") from None


def demand_splits(split: str, there: list[str]) -> list[str]:
    """Return the names in a split such as `train[:10%]+test`; raises SourceError for one that is not there."""
    names = [_SPLIT_NAME.split(piece)[0] for piece in split.split("+")]
    unknown = [name for name in names if name not in there]
    if unknown:
        guess = nearest(unknown[0], there)
        suggestion = f"did you mean {guess}?" if guess else "splits there: " + ", ".join(there)
        raise SourceError(Code.UNKNOWN_SPLIT, f"the data set has no such split: {unknown[0]}", suggestion, "split")
    return names


def parts_of(split: str, sizes: Mapping[str, int]) -> list[tuple[str, int, int]]:
    """Return the splits that a text such as `train[:10%]+test` means, with the first row and the end of each."""
    import datasets

    try:
        wanted = datasets.ReadInstruction.from_spec(split).to_absolute(dict(sizes))
    except (ValueError, AssertionError) as error:
        message = f"{split} is no split: {error}"
        raise SourceError(Code.UNKNOWN_SPLIT, message, "for example train[:10%]", "split") from None
    return [(part.splitname, part.from_ or 0, sizes[part.splitname] if part.to is None else part.to) for part in wanted]


def _take(loaded: Any, split: str) -> Any:
    """Return a split of a saved data set, a part of one (`train[:10%]`), or several (`train+test`)."""
    import datasets

    parts = loaded if isinstance(loaded, datasets.DatasetDict) else {_SPLIT_NAME.split(split)[0]: loaded}
    demand_splits(split, list(parts))
    if split in parts:
        return parts[split]
    wanted = parts_of(split, {name: len(part) for name, part in parts.items()})
    pieces = [parts[name].select(range(start, end)) for name, start, end in wanted]
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
