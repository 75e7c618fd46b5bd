"""Pictures that rows of text name: opened where the row says, known by the hash of their bytes."""

import base64
import binascii
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.data.image_rows import DATA_URL
from recipes.errors import RequestError


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

    def read(self) -> bytes:
        """Return the encoded bytes; raises RequestError for a file that has changed since it was hashed."""
        if isinstance(self.origin, bytes):
            return self.origin
        data = read_picture(self.origin, self.place)
        if hashlib.sha256(data).hexdigest() != self.digest:
            raise RequestError(f"{self.place}: {self.origin} changed while it was read")
        return data


def open_pictures(pictures: Sequence[Any], folder: Path, place: str) -> list[RowPicture]:
    """Hash a row's pictures; relative paths start at `folder`. Raises RequestError naming row and picture."""
    found = []
    for picture in pictures:
        origin = find_origin(picture, folder, place)
        data = origin if isinstance(origin, bytes) else read_picture(origin, place)
        if not data:
            raise RequestError(f"{place}: picture {_shown(picture)} is empty")
        found.append(RowPicture(hashlib.sha256(data).hexdigest(), place, origin))
    return found


def with_encoded_pictures(rows: Any) -> Any:
    """Return the rows of a `datasets` data set with pictures as encoded bytes instead of decoded ones."""
    import datasets

    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            rows = rows.cast_column(name, datasets.List(datasets.Image(decode=False)))
    return rows


def find_origin(picture: Any, folder: Path, place: str) -> Path | bytes:
    """Return the file or the bytes that a row's value means; raises RequestError for anything else."""
    if isinstance(picture, dict):
        picture = picture.get("path") if picture.get("bytes") is None else picture["bytes"]
    if isinstance(picture, bytes):
        return picture
    if not isinstance(picture, str) or not picture:
        raise RequestError(f"{place}: a picture is a path, bytes or {{bytes, path}}, not {_shown(picture)}")
    if picture.startswith(DATA_URL):
        head, _, body = picture.partition(",")
        try:
            if not head.endswith(";base64"):
                raise ValueError("not base64")
            return base64.b64decode(body, validate=True)
        except (ValueError, binascii.Error) as error:
            raise RequestError(f"{place}: the picture's data URL cannot be read: {error}") from None
    if "://" in picture:
        raise RequestError(f"{place}: picture {_shown(picture)} is a URL; nothing is downloaded, give a path")
    return folder / picture


def read_picture(path: Path, place: str) -> bytes:
    """Return a file's bytes; raises RequestError naming the row that names it."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise RequestError(f"{place}: picture {path} cannot be read: {error.strerror or error}") from None


def _shown(value: Any) -> str:
    return repr(value)[:80] if isinstance(value, str) else type(value).__name__
