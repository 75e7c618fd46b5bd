"""Images that rows of text name: found in the row, opened where it says, known by the hash of their bytes."""

import base64
import binascii
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.problem_codes import Code
from trainers.data.sources.reader import SourceError, reason

PART_KEYS = ("image", "path", "url", "bytes")
"""Keys under which a part {type: image} of a message may hold its image."""
DATA_URL = "data:image/"


@dataclass(frozen=True, slots=True)
class RowPicture:
    """An encoded picture of a row; files are read again where their pixels are needed."""

    digest: str
    """sha256 of the encoded bytes."""
    place: str
    """File and row, for messages."""
    origin: Path | bytes

    def __str__(self) -> str:
        """Give the hash alone: equal pictures go the same way, wherever they lie."""
        return self.digest

    @property
    def name(self) -> str:
        """File and row, and the picture's file."""
        return f"{self.place}: {self.origin}" if isinstance(self.origin, Path) else self.place

    def read(self) -> bytes:
        """Return the encoded bytes; raises SourceError for a file that has changed since it was hashed."""
        if isinstance(self.origin, bytes):
            return self.origin
        data = read_picture(self.origin, self.place)
        if hashlib.sha256(data).hexdigest() != self.digest:
            raise SourceError(Code.UNREADABLE_IMAGE, f"{self.place}: {self.origin} changed while it was read")
        return data


def find_pictures(row: Mapping[str, Any], columns: Mapping[Any, str]) -> list[Any] | None:
    """Return the pictures that a row names, in order, by column `images` or `image` or in the parts of its messages.

    Each is a path, a data URL, encoded bytes, or {bytes, path} as `datasets` writes them. None: the row says nothing
    of pictures; an empty list or null says that it has none.
    """
    for name in ("images", "image"):
        own = columns.get(name, name)
        if own in row:
            value = row[own]
            if value is None or (isinstance(value, str) and not value):
                return []
            return list(value) if isinstance(value, list | tuple) else [value]
    found = [picture for part in _picture_parts(row, columns) if (picture := part_picture(part)) is not None]
    return found or None


def part_picture(part: Mapping[str, Any]) -> Any | None:
    """Return the picture that a part {type: image} of a message holds; None where it only marks the place of one."""
    return next((part[key] for key in PART_KEYS if part.get(key) is not None), None)


def _picture_parts(row: Mapping[str, Any], columns: Mapping[Any, str]) -> Iterator[Mapping[str, Any]]:
    for name in ("messages", "prompt", "completion"):
        turns = row.get(columns.get(name, name))
        for turn in turns if isinstance(turns, list) else ():
            content = turn.get("content") if isinstance(turn, Mapping) else None
            for part in content if isinstance(content, list) else ():
                if isinstance(part, Mapping) and part.get("type") == "image":
                    yield part


def open_pictures(pictures: Sequence[Any], folder: Path, place: str) -> list[RowPicture]:
    """Hash a row's pictures; relative paths start at `folder`. Raises SourceError naming row and picture."""
    found = []
    for picture in pictures:
        origin = find_origin(picture, folder, place)
        data = origin if isinstance(origin, bytes) else read_picture(origin, place)
        if not data:
            raise SourceError(Code.UNREADABLE_IMAGE, f"{place}: picture {_shown(picture)} is empty")
        found.append(RowPicture(hashlib.sha256(data).hexdigest(), place, origin))
    return found


def find_origin(picture: Any, folder: Path, place: str) -> Path | bytes:
    """Return the file or the bytes that a row's value means; raises SourceError for anything else."""
    if isinstance(picture, dict):
        picture = picture.get("path") if picture.get("bytes") is None else picture["bytes"]
    if isinstance(picture, bytes):
        return picture
    if not isinstance(picture, str) or not picture:
        raise SourceError(
            Code.UNREADABLE_IMAGE, f"{place}: a picture is a path, bytes or {{bytes, path}}, not {_shown(picture)}"
        )
    if picture.startswith(DATA_URL):
        head, _, body = picture.partition(",")
        try:
            if not head.endswith(";base64"):
                raise ValueError("not base64")
            return base64.b64decode(body, validate=True)
        except (ValueError, binascii.Error) as error:
            raise SourceError(
                Code.UNREADABLE_IMAGE, f"{place}: the picture's data URL cannot be read: {error}"
            ) from None
    if "://" in picture:
        raise SourceError(
            Code.UNREADABLE_IMAGE, f"{place}: picture {_shown(picture)} is a URL; nothing is downloaded, give a path"
        )
    return folder / picture


def read_picture(path: Path, place: str) -> bytes:
    """Return a file's bytes; raises SourceError naming the row that names it."""
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise SourceError(Code.UNREADABLE_IMAGE, f"{place}: picture {path} cannot be read: {reason(error)}") from None


def _shown(value: Any) -> str:
    return repr(value)[:80] if isinstance(value, str) else type(value).__name__
