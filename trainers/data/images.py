"""Images row by row: read from every kind of source, decoded, converted, selected; errors name file and image."""

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recipes.data.images import ImageSetFacts, ImageSource
from recipes.problem_codes import Code
from trainers.data.selection import select
from trainers.data.sources.open import open_source
from trainers.data.sources.reader import RawRow, SourceError, columns_there, read_all

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's mode of each number of channels."""

Label = int | str | None


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """One image: where it came from, its pixels [H, W, C] of 8 bits, label and caption as the source writes them."""

    id: str
    pixels_HWC: np.ndarray
    label: Label
    caption: str | None = None
    """On every image of a source, or on none."""
    unread: tuple[str, ...] = ()
    """Columns of its row that hold something and that nothing reads."""

    def key(self) -> bytes:
        """Return what part, limit and hold_out go by: equal images go the same way."""
        shape = str(self.pixels_HWC.shape).encode()
        return hashlib.sha256(shape + np.ascontiguousarray(self.pixels_HWC).tobytes()).digest()


def read_images(source: ImageSource, base_dir: Path, seed: int, *, held_out: bool = False) -> Iterator[DecodedImage]:
    """Yield the selected images in source order; first hold_out (or with `held_out` only that), then part, limit.

    Raises SourceError naming file and image of anything unreadable, not finite, or out of range.
    """

    def images() -> Iterator[DecodedImage]:
        return (to_image(raw, source) for raw in read_all(open_source(source, base_dir)))

    return select(images, source, seed, held_out=held_out)


def decode_image(data: bytes, place: str, source: ImageSource) -> np.ndarray:
    """Return the pixels of an encoded image [H, W, C]; raises SourceError for damaged bytes."""
    image = open_image(data, place)
    if image.mode not in MODES.values():
        has_alpha = image.mode in ("LA", "PA") or "transparency" in image.info
        image = image.convert("L" if image.mode == "1" else "RGBA" if has_alpha else "RGB")
    return convert(np.asarray(image), place, source)


def open_image(data: bytes, place: str) -> Any:
    """Decode an image, turned upright as a camera's tag says; 16-bit grey becomes 8-bit. Raises SourceError."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as opened:
            opened.load()
            image = ImageOps.exif_transpose(opened)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        reason = "no format that Pillow knows" if isinstance(error, UnidentifiedImageError) else str(error)
        raise SourceError(Code.UNREADABLE_IMAGE, f"{place}: not a readable image: {reason}") from None
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if image.mode.startswith(("I", "F")):
        raise SourceError(
            Code.UNREADABLE_IMAGE, f"{place}: pixels of mode {image.mode}; 8 bits a channel and 16-bit grey are read"
        )
    return image


def convert(pixels: np.ndarray, place: str, source: ImageSource) -> np.ndarray:
    """Bring decoded pixels [H, W] or [H, W, C] to the source's channels and size."""
    from PIL import Image

    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.ndim != 3 or pixels.shape[2] not in MODES:
        raise SourceError(
            Code.INVALID_DATA_FORMAT,
            f"{place}: an array of shape {pixels.shape}; an image is [H, W] or [H, W, 1, 3 or 4]",
        )
    is_sized = source.size is None or pixels.shape[:2] == (source.size, source.size)
    if is_sized and source.channels in (None, pixels.shape[2]):
        return pixels
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels, MODES[pixels.shape[2]])
    if source.channels is not None and source.channels != pixels.shape[2]:
        if image.mode == "RGBA":
            black = Image.new("RGBA", image.size, (0, 0, 0, 255))
            image = Image.alpha_composite(black, image).convert("RGB")
        image = image.convert(MODES[source.channels])
    if source.size is not None and image.size != (source.size, source.size):
        image = image.resize((source.size, source.size), Image.Resampling.BOX)
    resized = np.asarray(image)
    return resized[:, :, None] if resized.ndim == 2 else resized


def from_numbers(values: Any, place: str) -> np.ndarray:
    """Return 8-bit pixels of an array of numbers: whole ones in 0..255, or floats in [0, 1]."""
    array = np.asarray(values)
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind not in "iuf":
        raise SourceError(Code.WRONG_CELL_TYPE, f"{place}: an image of {array.dtype}; expected numbers")
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise SourceError(
                Code.WRONG_CELL_TYPE, f"{place}: {int((~np.isfinite(array)).sum())} pixels are NaN or infinite"
            )
        low, high, allowed = float(array.min(initial=0)), float(array.max(initial=0)), "[0, 1] for floats"
        if low >= 0 and high <= 1:
            return np.asarray(np.rint(array * 255), dtype=np.uint8)
    else:
        low, high, allowed = int(array.min(initial=0)), int(array.max(initial=0)), "0 to 255 for whole numbers"
        if low >= 0 and high <= 255:
            return array.astype(np.uint8)
    raise SourceError(Code.WRONG_CELL_TYPE, f"{place}: pixels from {low:g} to {high:g}; expected {allowed}")


def to_image(raw: RawRow, source: ImageSource) -> DecodedImage:
    """Bring a row to pixels, label and caption; raises SourceError naming it."""
    image, label, caption = source.row_columns
    row = raw.columns
    for column in (image, label, caption):
        if column is not None and row.get(column) is None:
            there = [name for name, value in row.items() if value is not None]
            raise SourceError(Code.MISSING_COLUMN, f"{raw.place}: no column {column!r}", columns_there(there))
    value = row[image]
    if isinstance(value, dict):
        value = value.get("bytes")
        if value is None:
            raise SourceError(Code.UNREADABLE_IMAGE, f"{raw.place}: {image} names a file but holds no bytes")
    if isinstance(value, bytes):
        pixels = decode_image(value, raw.place, source)
    else:
        try:
            numbers = np.asarray(value)
        except ValueError:
            raise SourceError(Code.WRONG_CELL_TYPE, f"{raw.place}: {image} has rows of unequal length") from None
        pixels = convert(from_numbers(numbers, raw.place), raw.place, source)
    return DecodedImage(
        raw.id,
        pixels,
        None if label is None else _label(row[label], raw.place),
        None if caption is None else _caption(row[caption], raw.place),
        tuple(source.unread_columns(name for name, value in row.items() if value is not None and value != "")),
    )


class OneShape:
    """Images that must all have the size and channels of the first."""

    def __init__(self) -> None:
        self._first: DecodedImage | None = None

    def require(self, image: DecodedImage) -> DecodedImage:
        """Return the image; raises SourceError naming it and the first where they differ."""
        self._first = first = self._first or image
        if image.pixels_HWC.shape == first.pixels_HWC.shape:
            return image
        what = "channels" if first.pixels_HWC.shape[:2] == image.pixels_HWC.shape[:2] else "size"
        message = f"{image.id} is {_shape(image)}, {first.id} is {_shape(first)}"
        raise SourceError(Code.IMAGE_SHAPE_MISMATCH, message, f"set `{what}` to bring all to one shape")


def find_image_set_facts(source: ImageSource, base_dir: Path) -> ImageSetFacts | None:
    """Return the size that the source's images have, by the first one; None where it cannot be read."""
    if source.size is not None and source.channels is not None:
        return ImageSetFacts(source.channels, source.size, source.size)
    reader = open_source(source, base_dir)
    if reader.is_remote:
        return None
    try:
        first = next((to_image(raw, source) for raw in read_all(reader, limit=1)), None)
    except SourceError:
        return None
    if first is None:
        return None
    height, width, channels = first.pixels_HWC.shape
    return ImageSetFacts(channels, height, width)


def _shape(image: DecodedImage) -> str:
    height, width, channels = image.pixels_HWC.shape
    return f"{height}x{width} with {channels} channel{'s' if channels > 1 else ''}"


def _label(value: Any, place: str) -> Label:
    if isinstance(value, bool) or not isinstance(value, int | str | np.integer):
        raise SourceError(Code.WRONG_CELL_TYPE, f"{place}: label {value!r} is neither a whole number nor text")
    return value if isinstance(value, str) else int(value)


def _caption(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise SourceError(Code.WRONG_CELL_TYPE, f"{place}: caption {value!r} is no text")
    return " ".join(value.split())
