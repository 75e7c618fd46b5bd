"""Captions that lie beside pictures: a column of a CSV file, text files of the pictures' names, a folder's metadata."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from recipes.data.image_files import METADATA
from recipes.data.images import ImageFolder
from recipes.errors import RequestError
from trainers.data.files import read_csv, read_json_lines


def caption_text(value: Any, place: str) -> str:
    """Return a caption without blanks around it; raises RequestError for what is no text."""
    if not isinstance(value, str):
        raise RequestError(f"{place}: caption {value!r} is no text")
    return " ".join(value.split())


def caption_column(path: Path, column: str) -> list[str]:
    """Return the captions of a CSV or TSV file in its order."""
    found = []
    for name, row in _rows(path):
        if column not in row:
            raise RequestError(f"{path}: no column {column!r}; it has {', '.join(row)}")
        found.append(caption_text(row[column], f"{path}: row {name.rpartition(':')[2]}"))
    return found


def folder_caption_files(source: ImageFolder, folder: Path, pictures: Sequence[Path]) -> list[Path]:
    """Return the files that hold the captions of a folder's pictures; raises RequestError naming what is missing."""
    match source.captions:
        case "none":
            return []
        case "metadata":
            found = [folder / name for name in METADATA if (folder / name).is_file()]
            if not found:
                raise RequestError(f"{folder} holds no {' or '.join(METADATA)}")
            return found[:1]
        case "beside":
            texts = [path.with_suffix(".txt") for path in pictures]
            missing = [text for text in texts if not text.is_file()]
            if missing:
                raise RequestError(f"{missing[0]}: no such file; captions: beside needs one for each picture")
            return texts


def folder_captions(source: ImageFolder, folder: Path, pictures: Sequence[Path]) -> dict[str, str]:
    """Return captions by the pictures' names in the folder; every picture has one, or none has."""
    files = folder_caption_files(source, folder, pictures)
    names = [path.relative_to(folder).as_posix() for path in pictures]
    if source.captions == "beside":
        return {name: _read_text(file) for name, file in zip(names, files, strict=True)}
    found: dict[str, str] = {}
    for path in files:
        for place, row in _rows(path):
            for column in ("file_name", source.caption):
                if not isinstance(row.get(column), str):
                    raise RequestError(f"{path}: {place}: no text in {column!r}; it has {', '.join(row)}")
            found[row["file_name"]] = caption_text(row[source.caption], f"{path}: {place}")
    missing = [name for name in names if name not in found] if files else []
    if missing:
        raise RequestError(f"{files[0]} has no caption for {missing[0]} ({len(missing)} of {len(names)} pictures)")
    return found


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        yield from read_json_lines(path) if path.suffix == ".jsonl" else read_csv(path)
    except UnicodeDecodeError as error:
        raise RequestError(f"{path}: not UTF-8 at byte {error.start}") from None
    except (OSError, EOFError) as error:
        raise RequestError(f"{path}: {error}") from None


def _read_text(path: Path) -> str:
    try:
        return caption_text(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path}: {error}") from None
