"""Pictures row by row: read from every kind of source, decoded, converted, selected; errors name file and picture."""

import gzip
import hashlib
import importlib.util
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recipes.data.image_files import PICTURE_SUFFIXES
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
from recipes.errors import RequestError
from trainers.data.captions import caption_column, caption_text, folder_caption_files, folder_captions
from trainers.data.demo.digit_captions import caption_of
from trainers.data.files import files_digest, files_in_order, find_files, read_json_lines, read_parquet
from trainers.data.selection import select
from trainers.data.sources import datasets_digest, open_datasets

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's mode of each number of channels."""

Label = int | str | None


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture: where it came from, its pixels [H, W, C] of 8 bits, label and caption as the source writes them."""

    id: str
    pixels_HWC: np.ndarray
    label: Label
    caption: str | None = None
    """On every picture of a source, or on none."""

    def key(self) -> bytes:
        """Return what part, limit and hold_out go by: equal pictures go the same way."""
        shape = str(self.pixels_HWC.shape).encode()
        return hashlib.sha256(shape + np.ascontiguousarray(self.pixels_HWC).tobytes()).digest()


def image_source_digest(source: ImageSource, base_dir: Path) -> str:
    """Return 64 hex digits that change when the pictures can change; reads files, decodes nothing."""
    match source:
        case Digits():
            return files_digest([_digits_file()])
        case Idx():
            images, labels = files_in_order(source.files, base_dir), files_in_order(source.label_files, base_dir)
            return hashlib.sha256(json.dumps([files_digest(images), files_digest(labels)]).encode()).hexdigest()
        case ImageFolder():
            folder, paths = folder_files(source, base_dir)
            paths = [*paths, *folder_caption_files(source, folder, paths)]
            names = [path.relative_to(folder).as_posix() for path in paths]
            return hashlib.sha256(json.dumps([names, files_digest(paths)]).encode()).hexdigest()
        case ImageArrays():
            captions = files_in_order(source.caption_files, base_dir)
            return files_digest([*files_in_order(source.files, base_dir), *captions])
        case ImageParquet():
            return files_digest(find_files(source.files, base_dir))
        case ImageJsonLines():
            lines = find_files(source.files, base_dir)
            return files_digest([*lines, *(path for file in lines for path in _named_pictures(source, file))])
        case ImageDatasets():
            return datasets_digest(source, base_dir)


def read_pictures(source: ImageSource, base_dir: Path, seed: int, *, held_out: bool = False) -> Iterator[Picture]:
    """Yield the selected pictures in source order; first hold_out (or with `held_out` only that), then part, limit.

    Raises RequestError naming file and picture of anything unreadable, not finite, or out of range.
    """

    return select(lambda: _all_pictures(source, base_dir), source, seed, held_out=held_out)


def decode_picture(data: bytes, place: str, source: ImageSource) -> np.ndarray:
    """Return the pixels of an encoded picture [H, W, C]; raises RequestError for damaged bytes."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as opened:
            opened.load()
            image = opened.copy()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError) as error:
        raise RequestError(f"{place}: not a readable picture: {error}") from None
    if image.mode.startswith(("I", "F")):
        raise RequestError(f"{place}: pixels of mode {image.mode}; only 8 bits a channel are read")
    if image.mode not in MODES.values():
        has_alpha = image.mode in ("LA", "PA") or "transparency" in image.info
        image = image.convert("L" if image.mode == "1" else "RGBA" if has_alpha else "RGB")
    return convert(np.asarray(image), place, source)


def convert(pixels: np.ndarray, place: str, source: ImageSource) -> np.ndarray:
    """Bring decoded pixels [H, W] or [H, W, C] to the source's channels and size."""
    from PIL import Image

    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.ndim != 3 or pixels.shape[2] not in MODES:
        raise RequestError(f"{place}: an array of shape {pixels.shape}; a picture is [H, W] or [H, W, 1, 3 or 4]")
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
        raise RequestError(f"{place}: a picture of {array.dtype}; expected numbers")
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise RequestError(f"{place}: {int((~np.isfinite(array)).sum())} pixels are NaN or infinite")
        low, high, allowed = float(array.min(initial=0)), float(array.max(initial=0)), "[0, 1] for floats"
        if low >= 0 and high <= 1:
            return np.asarray(np.rint(array * 255), dtype=np.uint8)
    else:
        low, high, allowed = int(array.min(initial=0)), int(array.max(initial=0)), "0 to 255 for whole numbers"
        if low >= 0 and high <= 255:
            return array.astype(np.uint8)
    raise RequestError(f"{place}: pixels from {low:g} to {high:g}; expected {allowed}")


def _all_pictures(source: ImageSource, base_dir: Path) -> Iterator[Picture]:
    match source:
        case Digits():
            yield from _read_digits(source)
        case Idx():
            yield from _read_idx(source, base_dir)
        case ImageFolder():
            yield from _read_folder(source, base_dir)
        case ImageArrays():
            yield from _read_arrays(source, base_dir)
        case ImageParquet():
            for path in find_files(source.files, base_dir):
                for name, row in read_parquet(path):
                    yield _from_row(row, name, f"{path}: row {name.rpartition(':')[2]}", source)
        case ImageJsonLines():
            for path in find_files(source.files, base_dir):
                for name, row in read_json_lines(path):
                    place = f"{path}:{name.rpartition(':')[2]}"
                    if isinstance(file := row.get(source.image), str):
                        row[source.image] = _read_named(path.parent / file, place)
                    yield _from_row(row, name, place, source)
        case ImageDatasets():
            rows = open_datasets(source, base_dir)
            import datasets

            if isinstance(rows.features.get(source.image), datasets.Image):
                rows = rows.cast_column(source.image, datasets.Image(decode=False))
            for number, row in enumerate(rows, start=1):
                yield _from_row(row, f"{source.path}:{number}", f"{source.path}: row {number}", source)


def _named_pictures(source: ImageJsonLines, file: Path) -> list[Path]:
    """Files that the lines of a file name."""
    named = [row.get(source.image) for _, row in read_json_lines(file)]
    paths = [file.parent / name for name in named if isinstance(name, str)]
    return [path for path in paths if path.is_file()]


def _read_named(path: Path, place: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RequestError(f"{place}: {path}: {error.strerror}") from None


def _from_row(
    row: dict[str, Any], name: str, place: str, source: ImageJsonLines | ImageParquet | ImageDatasets
) -> Picture:
    for column in (source.image, source.label, source.caption):
        if column is not None and row.get(column) is None:
            there = ", ".join(sorted(key for key, value in row.items() if value is not None))
            raise RequestError(f"{place}: no {column!r}; it has {there}")
    value = row[source.image]
    if isinstance(value, dict):
        value = value.get("bytes")
        if value is None:
            raise RequestError(f"{place}: {source.image} names a file but holds no bytes")
    if isinstance(value, bytes):
        pixels = decode_picture(value, place, source)
    else:
        try:
            numbers = np.asarray(value)
        except ValueError:
            raise RequestError(f"{place}: {source.image} has rows of unequal length") from None
        pixels = convert(from_numbers(numbers, place), place, source)
    label = None if source.label is None else _label(row[source.label], place)
    return Picture(name, pixels, label, None if source.caption is None else caption_text(row[source.caption], place))


def _label(value: Any, place: str) -> Label:
    if isinstance(value, bool) or not isinstance(value, int | str | np.integer):
        raise RequestError(f"{place}: label {value!r} is neither a whole number nor text")
    return value if isinstance(value, str) else int(value)


def _digits_file() -> Path:
    found = importlib.util.find_spec("sklearn")
    places = [] if found is None else [Path(place) for place in found.submodule_search_locations or []]
    for place in places:
        file = place / "datasets" / "data" / "digits.csv.gz"
        if file.is_file():
            return file
    raise RequestError("source digits: scikit-learn is not installed; pip install scikit-learn")


def _read_digits(source: Digits) -> Iterator[Picture]:
    path = _digits_file()
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float64)
    for number, row in enumerate(table):
        pixels = np.rint(row[:-1].reshape(8, 8) * (255 / 16)).astype(np.uint8)
        caption = caption_of(pixels, int(row[-1]))
        yield Picture(f"digits:{number}", convert(pixels, f"digits: row {number}", source), int(row[-1]), caption)


def _read_idx(source: Idx, base_dir: Path) -> Iterator[Picture]:
    label_files = files_in_order(source.label_files, base_dir)
    files = files_in_order(source.files, base_dir)
    if label_files and len(label_files) != len(files):
        raise RequestError(f"label_files has {len(label_files)} files, files {len(files)}")
    for index, path in enumerate(files):
        images = _idx_array(path, 3)
        labels = _idx_array(label_files[index], 1) if label_files else None
        if labels is not None and len(labels) != len(images):
            raise RequestError(f"{label_files[index]} has {len(labels)} labels, {path} {len(images)} pictures")
        for number, pixels in enumerate(images):
            label = None if labels is None else int(labels[number])
            yield Picture(f"{path.name}:{number}", convert(pixels, f"{path}: picture {number}", source), label)


def _idx_array(path: Path, dimensions: int) -> np.ndarray:
    """Read an IDX file: 00 00 08 (unsigned byte), the number of dimensions, their sizes big-endian, the values."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            data = file.read()
    except (OSError, EOFError) as error:
        raise RequestError(f"{path}: {error}") from None
    start = 4 + 4 * dimensions
    if len(data) < start or data[:3] != b"\x00\x00\x08" or data[3] != dimensions:
        raise RequestError(f"{path} is not an IDX file of unsigned bytes with {dimensions} dimensions")
    shape = tuple(int(size) for size in np.frombuffer(data, dtype=">u4", count=dimensions, offset=4))
    values = np.frombuffer(data, dtype=np.uint8, offset=start)
    if values.size != int(np.prod(shape)):
        raise RequestError(f"{path} is cut off: {values.size} bytes of {'x'.join(map(str, shape))}")
    return values.reshape(shape)


def folder_files(source: ImageFolder, base_dir: Path) -> tuple[Path, list[Path]]:
    """Return a source's folder and its pictures, sorted; raises RequestError where there are none."""
    folder = base_dir / source.path
    if not folder.is_dir():
        raise RequestError(f"picture folder {source.path!r} does not exist (looked in {base_dir})")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file())
    if not paths:
        raise RequestError(f"{folder} holds no pictures; files that end in {' '.join(PICTURE_SUFFIXES)}")
    return folder, paths


def _read_folder(source: ImageFolder, base_dir: Path) -> Iterator[Picture]:
    folder, paths = folder_files(source, base_dir)
    captions = folder_captions(source, folder, paths)
    for path in paths:
        name = path.relative_to(folder)
        label = None
        if source.labels == "folder":
            if len(name.parts) < 2:
                message = "lies in no folder that could be its label; move it into one, or set labels: none"
                raise RequestError(f"{path} {message}")
            label = name.parts[0]
        pixels = decode_picture(path.read_bytes(), str(path), source)
        yield Picture(name.as_posix(), pixels, label, captions.get(name.as_posix()))


def _read_arrays(source: ImageArrays, base_dir: Path) -> Iterator[Picture]:
    files, caption_files = files_in_order(source.files, base_dir), files_in_order(source.caption_files, base_dir)
    if caption_files and len(caption_files) != len(files):
        raise RequestError(f"caption_files has {len(caption_files)} files, files {len(files)}")
    for index, path in enumerate(files):
        images, labels = _load_arrays(source, path)
        captions = caption_column(caption_files[index], source.caption) if caption_files else None
        if captions is not None and len(captions) != len(images):
            raise RequestError(f"{caption_files[index]} has {len(captions)} captions, {path} {len(images)} pictures")
        if images.ndim not in (3, 4):
            raise RequestError(f"{path}: {source.images} has shape {images.shape}; expected [N, H, W] or [N, H, W, C]")
        if labels is not None and labels.shape != images.shape[:1]:
            raise RequestError(f"{path}: {len(images)} pictures but labels of shape {labels.shape}")
        for number, values in enumerate(images):
            place = f"{path}: picture {number}"
            label = None if labels is None else _label(labels[number].item(), place)
            pixels = convert(from_numbers(values, place), place, source)
            yield Picture(f"{path.name}:{number}", pixels, label, None if captions is None else captions[number])


def _load_arrays(source: ImageArrays, path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            if source.labels is not None:
                raise RequestError(f"{path}: a .npy file holds one array; labels need an .npz")
            return loaded, None
        with loaded:
            for name in (source.images, source.labels):
                if name is not None and name not in loaded.files:
                    raise RequestError(f"{path}: no array {name!r}; it has {', '.join(loaded.files)}")
            return loaded[source.images], None if source.labels is None else loaded[source.labels]
    except (OSError, ValueError, EOFError) as error:
        raise RequestError(f"{path}: not readable as NumPy arrays: {error}") from None
