"""The local files of a source, and where they would lie in a folder that holds nothing else: for sending them away."""

import glob
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipes.data.images import (
    Digits,
    Idx,
    ImageArrays,
    ImageDatasets,
    ImageFolder,
    ImageJsonLines,
    ImageParquet,
    ImageSource,
)
from recipes.data.text import Csv, Datasets, JsonLines, Parquet, PythonDocs, PythonSummaries, Source, TextFiles
from trainers.data.captions import folder_caption_files
from trainers.data.files import files_in_order, find_files, read_json_lines
from trainers.data.image_text_digest import named_files, named_in_dataset
from trainers.data.images import folder_files
from trainers.data.sources import dataset_files


@dataclass(frozen=True)
class SourceFiles:
    """Files by their place in the folder, and the source's keys (`files`, `path`, ...) as they would read there.

    The source with those keys has the digest that it has here: names, order and what rows name stay as they are.
    """

    files: dict[str, Path]
    keys: dict[str, Any]
    immovable: list[str] = field(default_factory=list)
    """Files that rows name in a way that leads nowhere else: by an absolute path, or outside a data set's folder."""


def source_files(source: Source | ImageSource, base_dir: Path, *, names_pictures: bool) -> SourceFiles | None:
    """Find a source's files; None for one that every installation has, or the hub.

    `names_pictures`: its rows of text name files of pictures. Raises RequestError naming a file that is missing.
    """
    match source:
        case PythonDocs() | PythonSummaries() | Digits():
            return None
        case TextFiles() | JsonLines() | Csv() | Parquet():
            paths = find_files(source.files, base_dir)
            return _rows_files(paths, [named_files(source, path) if names_pictures else () for path in paths])
        case ImageParquet():
            return _rows_files(paths := find_files(source.files, base_dir), [()] * len(paths))
        case ImageJsonLines():
            paths = find_files(source.files, base_dir)
            return _rows_files(paths, [_pictures_of_lines(source, path) for path in paths])
        case Idx():
            return _listed({name: files_in_order(getattr(source, name), base_dir) for name in ("files", "label_files")})
        case ImageArrays():
            return _listed(
                {name: files_in_order(getattr(source, name), base_dir) for name in ("files", "caption_files")}
            )
        case ImageFolder():
            folder, pictures = folder_files(source, base_dir)
            return _folder(folder, [*pictures, *folder_caption_files(source, folder, pictures)])
        case Datasets() | ImageDatasets():
            found = dataset_files(source, base_dir)
            if found is None:
                return None
            folder, paths = found
            moved = _folder(folder, paths)
            if names_pictures and isinstance(source, Datasets):
                outside = [name for name in named_in_dataset(source, base_dir) if not _is_inside(name)]
                moved = SourceFiles(moved.files, moved.keys, sorted(set(outside)))
            return SourceFiles(moved.files, {**moved.keys, "revision": None}, moved.immovable)


def _pictures_of_lines(source: ImageJsonLines, path: Path) -> list[str]:
    named = [row.get(source.image) for _, row in read_json_lines(path)]
    return [name for name in named if isinstance(name, str) and (path.parent / name).is_file()]


def _rows_files(paths: Sequence[Path], named: Sequence[Iterable[str]]) -> SourceFiles:
    """Files of rows, each in a folder of its own with the pictures that it names, which stay where they are from it."""
    files: dict[str, Path] = {}
    listed: list[str] = []
    immovable: set[str] = set()
    for number, (path, names) in enumerate(zip(paths, named, strict=True)):
        home = Path(os.path.abspath(path)).parent
        pictures = {}
        for name in names:
            if Path(name).is_absolute():
                immovable.add(name)
            else:
                pictures[os.path.normpath(home / name)] = home / name
        root = os.path.commonpath([home, *(os.path.dirname(place) for place in pictures)])
        folder = _numbered(number, len(paths))
        files |= {f"{folder}/{os.path.relpath(place, root)}": picture for place, picture in pictures.items()}
        place = f"{folder}/{os.path.relpath(home / path.name, root)}"
        files[place] = path
        listed.append(glob.escape(place))
    return SourceFiles(files, {"files": listed}, sorted(immovable))


def _listed(by_key: dict[str, list[Path]]) -> SourceFiles:
    """Files in the order of their lists, each in a folder of its own."""
    files: dict[str, Path] = {}
    keys: dict[str, Any] = {}
    for key, paths in by_key.items():
        places = [f"{key}/{_numbered(number, len(paths))}/{path.name}" for number, path in enumerate(paths)]
        files |= dict(zip(places, paths, strict=True))
        keys[key] = [glob.escape(place) for place in places]
    return SourceFiles(files, keys)


def _folder(folder: Path, paths: Iterable[Path]) -> SourceFiles:
    return SourceFiles({f"folder/{path.relative_to(folder).as_posix()}": path for path in paths}, {"path": "folder"})


def _numbered(number: int, count: int) -> str:
    """A folder's name that sorts as its number does."""
    return f"{number:0{len(str(count))}d}"


def _is_inside(name: str) -> bool:
    return not Path(name).is_absolute() and not os.path.normpath(name).startswith("..")
