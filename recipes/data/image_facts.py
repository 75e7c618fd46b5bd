"""What the header of a source's first file says of its pictures; no picture is decoded."""

import gzip
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from recipes.data.files import match_files
from recipes.data.image_files import PICTURE_SUFFIXES
from recipes.data.images import Digits, Idx, ImageArrays, ImageFolder, ImageSource

CLASSES = 10
"""Taken where a header does not tell: it moves the number of parameters by a few rows of a matrix."""
_PNG_CHANNELS = {0: 1, 2: 3, 3: 3, 4: 4, 6: 4}
"""Channels that a PNG's colour type is read as; a palette becomes RGB."""


@dataclass(frozen=True)
class PictureFacts:
    """Size of a stage's pictures, and how many classes they have at most."""

    channels: int
    height: int
    width: int
    classes: int = CLASSES


def find_picture_facts(source: ImageSource, base_dir: Path) -> PictureFacts | None:
    """The size that the source's pictures will have; None where no header tells it or none can be read."""
    found: tuple[int, int, int] | None = None
    if source.size is None or source.channels is None:
        try:
            found = _first(source, base_dir)
        except (OSError, EOFError, ValueError, struct.error):
            return None
        if found is None:
            return None
    channels, height, width = found or (0, 0, 0)
    height, width = (height, width) if source.size is None else (source.size, source.size)
    return PictureFacts(source.channels or channels, height, width)


def _first(source: ImageSource, base_dir: Path) -> tuple[int, int, int] | None:
    """Channels, height and width of the first picture as it lies in its file."""
    match source:
        case Digits():
            return 1, 8, 8
        case Idx():
            (path, *_) = match_files(source.files[0], base_dir)
            with _open(path) as stream:
                _, _, height, width = struct.unpack(">4I", stream.read(16))
            return 1, height, width
        case ImageArrays():
            (path, *_) = match_files(source.files[0], base_dir)
            return _array_shape(path)
        case ImageFolder():
            files = (base_dir / source.path).rglob("*")
            first = min((file for file in files if file.suffix.lower() in PICTURE_SUFFIXES), default=None)
            return None if first is None else _png_shape(first)
        case _:
            return None


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def _png_shape(path: Path) -> tuple[int, int, int] | None:
    """Read a PNG's IHDR chunk; None for another format."""
    with path.open("rb") as stream:
        head = stream.read(26)
    if not head.startswith(b"\x89PNG\r\n\x1a\n"):
        return None
    width, height, _, colour = struct.unpack(">IIBB", head[16:26])
    return _PNG_CHANNELS[colour], height, width


def _array_shape(path: Path) -> tuple[int, int, int] | None:
    """Read the header of a .npy file: [N, H, W] or [N, H, W, C]; archives of them are not opened here."""
    if path.suffix != ".npy":
        return None
    with path.open("rb") as stream:
        text = stream.read(4096).decode("latin-1")
    inside = text[text.index("'shape': (") + len("'shape': (") :]
    shape = [int(part) for part in inside[: inside.index(")")].split(",") if part.strip()]
    if len(shape) not in (3, 4):
        return None
    return (shape[3] if len(shape) == 4 else 1), shape[1], shape[2]
