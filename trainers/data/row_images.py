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
class RowImage:
    """An encoded image of a row; files are read again where their pixels are needed."""

    digest: str
    """sha256 of the encoded bytes."""
    place: str
    """File and row, for messages."""
    origin: Path | bytes

    def __str__(self) -> str:
        """Give the hash alone: equal images go the same way, wherever they lie."""
        return self.digest

    @property
    def name(self) -> str:
        """File and row, and the image's file."""
        return f"{self.place}: {self.origin}" if isinstance(self.origin, Path) else self.place

    def read(self) -> bytes:
        """Return the encoded bytes; raises SourceError for a file that has changed since it was hashed."""
        if isinstance(self.origin, bytes):
            return self.origin
        data = read_image(self.origin, self.place)
        if hashlib.sha256(data).hexdigest() != self.digest:
            raise SourceError(Code.UNREADABLE_IMAGE, f"{self.place}: {self.origin} changed while it was read")
        return data


def find_images(row: Mapping[str, Any], columns: Mapping[Any, str]) -> list[Any] | None:
    """Return the images that a row names, in order, by column `images` or `image` or in the parts of its messages.

    Each is a path, a data URL, encoded bytes, or {bytes, path} as `datasets` writes them. None: the row says nothing
    of images; an empty list or null says that it has none.
    """
    for name in ("images", "image"):
        own = columns.get(name, name)
        if own in row:
            value = row[own]
            if value is None or (isinstance(value, str) and not value):
                return []
            return list(value) if isinstance(value, list | tuple) else [value]
    found = [image for part in _image_parts(row, columns) if (image := part_image(part)) is not None]
    return found or None


def part_image(part: Mapping[str, Any]) -> Any | None:
    """Return the image that a part {type: image} of a message holds; None where it only marks the place of one."""
    return next((part[key] for key in PART_KEYS if part.get(key) is not None), None)


def _image_parts(row: Mapping[str, Any], columns: Mapping[Any, str]) -> Iterator[Mapping[str, Any]]:
    for name in ("messages", "prompt", "completion"):
        turns = row.get(columns.get(name, name))
        for turn in turns if isinstance(turns, list) else ():
            content = turn.get("content") if isinstance(turn, Mapping) else None
            for part in content if isinstance(content, list) else ():
                if isinstance(part, Mapping) and part.get("type") == "image":
                    yield part


def open_row_images(images: Sequence[Any], folder: Path, place: str) -> list[RowImage]:
    """Hash a row's images; relative paths start at `folder`. Raises SourceError naming row and image."""
    found = []
    for image in images:
        origin = find_origin(image, folder, place)
        data = origin if isinstance(origin, bytes) else read_image(origin, place)
        if not data:
            raise SourceError(Code.UNREADABLE_IMAGE, f"{place}: image {_shown(image)} is empty")
        found.append(RowImage(hashlib.sha256(data).hexdigest(), place, origin))
    return found


def find_origin(image: Any, folder: Path, place: str) -> Path | bytes:
    """Return the file or the bytes that a row's value means; raises SourceError for anything else."""
    if isinstance(image, dict):
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    if isinstance(image, bytes):
        return image
    if not isinstance(image, str) or not image:
        raise SourceError(
            Code.UNREADABLE_IMAGE, f"{place}: an image is a path, bytes or {{bytes, path}}, not {_shown(image)}"
        )
    if image.startswith(DATA_URL):
        head, _, body = image.partition(",")
        try:
            if not head.endswith(";base64"):
                raise ValueError("not base64")
            return base64.b64decode(body, validate=True)
        except (ValueError, binascii.Error) as error:
            raise SourceError(Code.UNREADABLE_IMAGE, f"{place}: the image's data URL cannot be read: {error}") from None
    if "://" in image:
        raise SourceError(
            Code.UNREADABLE_IMAGE, f"{place}: image {_shown(image)} is a URL; nothing is downloaded, give a path"
        )
    return folder / image


def read_image(path: Path, place: str) -> bytes:
    """Return a file's bytes; raises SourceError naming the row that names it."""
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise SourceError(Code.UNREADABLE_IMAGE, f"{place}: image {path} cannot be read: {reason(error)}") from None


def _shown(value: Any) -> str:
    return repr(value)[:80] if isinstance(value, str) else type(value).__name__
