"""Folders of images, with captions in files beside them or in the folder's metadata."""

import hashlib
import json
import os
import posixpath
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from recipes.data.images import METADATA, ImageFolder
from recipes.problem_codes import Code
from trainers.data.sources.archives import is_archive, unpack
from trainers.data.sources.csv_files import read_csv
from trainers.data.sources.json_lines import read_json_lines
from trainers.data.sources.local_files import files_digest, is_hidden, naming_file
from trainers.data.sources.reader import FolderFiles, Part, RawRow, SourceError, columns_there

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
"""Names of files that are read."""
SPLITS = frozenset({"train", "test", "val", "valid", "validation", "dev"})
"""Names of folders that are splits of a data set."""
METADATA_FILES = ("metadata.jsonl", "metadata.csv")
"""Names of the file with a folder's captions."""


@dataclass(frozen=True)
class ImageFolderReader:
    """Reads the images of a folder and the folders below it: columns image (encoded), label and caption."""

    source: ImageFolder
    base_dir: Path
    is_remote = False

    def parts(self) -> Iterator[Part]:
        """Yield the folder."""
        yield Part("path", self._read)

    def digest(self) -> str:
        """Hash names and bytes of the images, and of the files with their captions."""
        paths = self.files().paths
        names = [path.relative_to(self._folder).as_posix() for path in paths]
        return hashlib.sha256(json.dumps([names, files_digest(paths)]).encode()).hexdigest()

    def files(self) -> FolderFiles:
        """Return the images, then the files with their captions."""
        names = self._names()
        return FolderFiles(self._folder, [*(self._folder / name for name in names), *self._caption_files(names)])

    @cached_property
    def _folder(self) -> Path:
        """The folder itself, or that of an archive's members: every image's path is compared with it."""
        path = self.base_dir / self.source.path
        return unpack(path) if is_archive(path) else path

    def _names(self) -> list[str]:
        """Return the images' names below the folder, in the order of their paths."""
        folder = self._folder
        if not folder.is_dir():
            message = f"{self.source.path} is a file, not a folder" if folder.exists() else "there is no such folder"
            raise SourceError(Code.MISSING_FOLDER, message, f"looked for {folder}", "path")
        names = ["/".join(parts) for parts in sorted(_image_parts(folder))]
        if not names:
            raise SourceError(
                Code.MISSING_IMAGES,
                "the folder holds no images",
                f"files that end in {' '.join(IMAGE_SUFFIXES)}",
                "path",
            )
        return names

    def _caption_files(self, names: list[str]) -> list[Path]:
        match self.source.captions:
            case "none":
                return []
            case "metadata":
                found = [self._folder / name for name in METADATA_FILES if (self._folder / name).is_file()]
                if not found:
                    message = f"the folder holds no {' or '.join(METADATA_FILES)}"
                    raise SourceError(Code.MISSING_CAPTIONS, message, "rows with file_name and a caption", "captions")
                return found[:1]
            case "beside":
                texts = [(self._folder / name).with_suffix(".txt") for name in names]
                bare = next((name for name, text in zip(names, texts, strict=True) if not text.is_file()), None)
                if bare is not None:
                    message = f"{self._folder / bare} has no text file beside it"
                    raise SourceError(
                        Code.MISSING_CAPTIONS, message, f"write {Path(bare).with_suffix('.txt').name}", "captions"
                    )
                return texts

    def _read(self, limit: int | None) -> Iterator[RawRow]:
        names = self._names()
        self._demand_classes(names)
        captions = self._captions(names, limit)
        for name in names:
            path = self._folder / name
            columns: dict[str, Any] = {}
            if self.source.labels == "folder":
                label, slash, _ = name.partition("/")
                if not slash:
                    message = f"{path} lies in no folder that could be its label"
                    raise SourceError(Code.MISSING_LABELS, message, "move it into one, or set labels: none")
                columns["label"] = label
            columns |= captions.get(_known_as(name), {})
            with naming_file(path):
                columns["image"] = path.read_bytes()
            yield RawRow(name, str(path), columns, self._folder)

    def _demand_classes(self, names: list[str]) -> None:
        """Raise SourceError where the folders are splits of a data set, not classes."""
        folders = {name.partition("/")[0] for name in names}
        if self.source.labels == "folder" and folders <= SPLITS:
            named = " and ".join(sorted(folders))
            message = f"{named} below {self.source.path} are splits of a data set, not classes"
            advice = f"path: {self.source.path}/{max(folders, key='train'.__eq__)}"
            raise SourceError(Code.MISSING_LABELS, message, advice, "path")

    def _captions(self, names: list[str], limit: int | None) -> dict[str, dict[str, Any]]:
        """Read captions, and what else the metadata says, by the images' names; every image has one, or none has."""
        files = self._caption_files(names)
        if self.source.captions == "beside":
            pairs = islice(zip(names, files, strict=True), limit)
            return {_known_as(name): {"caption": _read_text(file)} for name, file in pairs}
        found: dict[str, dict[str, Any]] = {}
        for path in files:
            found |= self._metadata(path)
            missing = [name for name in names if _known_as(name) not in found]
            if missing:
                message = f"{path} has no caption for {missing[0]} ({len(missing)} of {len(names)} images)"
                raise SourceError(Code.MISSING_CAPTIONS, message, field="captions")
        return found

    def _metadata(self, path: Path) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        with naming_file(path):
            for row in read_json_lines(path) if path.suffix == ".jsonl" else read_csv(path):
                for column in ("file_name", self.source.caption):
                    if not isinstance(row.columns.get(column), str):
                        message = f"{row.place}: no text in {column!r}"
                        raise SourceError(Code.MISSING_COLUMN, message, columns_there(row.columns), "caption")
                others = {name: value for name, value in row.columns.items() if name != self.source.caption}
                name = _known_as(others.pop("file_name"))
                found[name] = {f"{METADATA}.{key}": value for key, value in others.items()}
                found[name]["caption"] = row.columns[self.source.caption]
        return found


def _image_parts(folder: Path, below: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the parts of the names of the images in a folder, without what a system or a tool left there.

    Folders that are links are not followed.
    """
    with naming_file(folder), os.scandir(folder) as entries:
        for entry in entries:
            parts = (*below, entry.name)
            if is_hidden(entry.name):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from _image_parts(folder / entry.name, parts)
            elif entry.name.lower().endswith(IMAGE_SUFFIXES) and entry.is_file():
                yield parts


def _known_as(name: str) -> str:
    """Return an image's name as any way of writing it: ./ before it, accents as own characters (as macOS writes)."""
    return unicodedata.normalize("NFC", posixpath.normpath(name))


def _read_text(path: Path) -> str:
    with naming_file(path):
        try:
            return path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise SourceError(Code.NOT_UTF8, f"{path}: not UTF-8 at byte {error.start}", field="captions") from None
