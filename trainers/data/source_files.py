"""The local files of a source, and where they would lie in a folder that holds nothing else: for sending them away."""

import glob
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from recipes.data.filters import ByContamination
from recipes.data.images import ImageSource
from recipes.data.text import PlainSource, Source
from trainers.data.filters.contamination import evaluation_sources
from trainers.data.image_text_digest import named_images
from trainers.data.sources.open import open_source
from trainers.data.sources.reader import FolderFiles, ListedFiles, Reader, RowFiles


@dataclass(frozen=True)
class SourceFiles:
    """Files by their place in the folder, and the source's keys (`files`, `mix.0.path`, ...) as they would read there.

    The source with those keys has the digest that it has here: names, order and what rows name stay as they are.
    """

    files: dict[str, Path]
    keys: dict[str, Any]
    immovable: list[str] = field(default_factory=list)
    """Files that rows name in a way that leads nowhere else: by an absolute path, or outside a data set's folder."""


def source_files(source: Source | ImageSource, base_dir: Path, *, names_images: bool) -> SourceFiles | None:
    """Find a source's files; None for one that every installation has, or the hub.

    `names_images`: its rows of text name files of images. Raises SourceError for a file that is missing.
    """
    found = {
        member.field: files
        for member in source.members()
        if (files := _files_of(member.source, base_dir, names_images=names_images)) is not None
    }
    for path, settings in source.all_filters():
        if isinstance(settings, ByContamination):
            read = [open_source(own, base_dir).files() for own in evaluation_sources(settings.against)]
            listed = _listed({"against": [path for own in read if isinstance(own, RowFiles) for path in own.paths]})
            found[f"{path}."] = listed
    if not found or list(found) == [""]:
        return found.get("")
    return SourceFiles(
        {_below(field, place): path for field, own in found.items() for place, path in own.files.items()},
        {field + key: _below(field, value) for field, own in found.items() for key, value in own.keys.items()},
        [place for own in found.values() for place in own.immovable],
    )


def below(folder: str, value: Any) -> Any:
    """Return what a source says of where its files lie, once they lie below a folder."""
    if isinstance(value, list):
        return [below(folder, item) for item in value]
    return f"{folder}/{value}" if isinstance(value, str) else value


def _below(field: str, value: Any) -> Any:
    return below(field.removesuffix("."), value) if field else value


def _files_of(source: PlainSource | ImageSource, base_dir: Path, *, names_images: bool) -> SourceFiles | None:
    reader = open_source(source, base_dir)
    match reader.files():
        case None:
            return None
        case RowFiles(paths, named):
            if names_images:
                named = _named(reader, cast(PlainSource, source))
            return _rows_files(paths, [named.get(path, ()) for path in paths])
        case ListedFiles(by_key):
            return _listed(by_key)
        case FolderFiles(folder, paths, other_keys):
            moved = _folder(folder, paths)
            outside: set[str] = set()
            if names_images:
                outside = {
                    name
                    for names in _named(reader, cast(PlainSource, source)).values()
                    for name in names
                    if not _is_inside(name)
                }
            return SourceFiles(moved.files, {**moved.keys, **other_keys}, sorted(outside))


def _named(reader: Reader, source: PlainSource) -> dict[Path, list[str]]:
    """Read which images the rows name, by the rows' file."""
    return {
        part.path: list(dict.fromkeys(str(path) for raw in part.rows() for path in named_images(raw, source)))
        for part in reader.parts()
    }


def _rows_files(paths: Sequence[Path], named: Sequence[Iterable[str]]) -> SourceFiles:
    """Files of rows, each in a folder of its own with the images that it names, which stay where they are from it."""
    files: dict[str, Path] = {}
    listed: list[str] = []
    immovable: set[str] = set()
    for number, (path, names) in enumerate(zip(paths, named, strict=True)):
        home = Path(os.path.abspath(path)).parent
        images = {}
        for name in names:
            if Path(name).is_absolute():
                immovable.add(name)
            else:
                images[os.path.normpath(home / name)] = home / name
        root = os.path.commonpath([home, *(os.path.dirname(place) for place in images)])
        folder = _numbered(number, len(paths))
        files |= {f"{folder}/{os.path.relpath(place, root)}": image for place, image in images.items()}
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
