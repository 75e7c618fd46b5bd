"""NumPy files with arrays of images."""

import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from math import prod
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any

import numpy as np

from recipes.data.images import ImageArrays
from recipes.nearest import nearest
from recipes.problem_codes import Code
from trainers.data.sources.csv_files import read_csv
from trainers.data.sources.idx import demand_one_each, no_rows
from trainers.data.sources.local_files import Found, file_parts, files_digest, find_each, naming_file, require
from trainers.data.sources.reader import ListedFiles, Part, RawRow, SourceError, columns_there


@dataclass(frozen=True, slots=True)
class ArraysReader:
    """Reads .npy and .npz files: columns image, and label and caption where the source names them."""

    source: ImageArrays
    base_dir: Path
    is_remote = False

    def parts(self) -> Iterator[Part]:
        """Yield the files of images, each with its captions."""
        images, captions = self._images(), self._caption_files()
        yield from file_parts((found for found in captions if isinstance(found[1], SourceError)), no_rows)
        for found, caption_file in zip_longest(images, captions):
            if found is not None:
                path = caption_file[1] if caption_file is not None else None
                yield from file_parts([found], partial(self._read, path if isinstance(path, Path) else None))

    def digest(self) -> str:
        """Hash the bytes of images, then of captions, in the order of the recipe."""
        return files_digest(path for paths in self.files().by_key.values() for path in paths)

    def files(self) -> ListedFiles:
        """Return the files of images and of captions."""
        return ListedFiles({"files": require(self._images()), "caption_files": require(self._caption_files())})

    def _images(self) -> list[Found]:
        return find_each(self.source.files, self.base_dir)

    def _caption_files(self) -> list[Found]:
        found = find_each(self.source.caption_files, self.base_dir, "caption_files")
        return demand_one_each(found, self._images(), "caption_files")

    def _read(self, caption_file: Path | None, path: Path, limit: int | None) -> Iterator[RawRow]:
        images, count, labels = self._load(path, limit)
        captions = None if caption_file is None else self._captions(caption_file)
        if captions is not None and len(captions) != count:
            message = f"{caption_file} has {len(captions)} captions, {path} {count} images"
            raise SourceError(Code.FILE_COUNT_MISMATCH, message, field="caption_files")
        for number, values in enumerate(images):
            columns: dict[str, Any] = {"image": values}
            if labels is not None:
                columns["label"] = labels[number].item()
            if captions is not None:
                columns["caption"] = captions[number]
            yield RawRow(f"{path.name}:{number}", f"{path}: image {number}", columns, path.parent)

    def _load(self, path: Path, limit: int | None) -> tuple[np.ndarray, int, np.ndarray | None]:
        """Read images, or the first of them, with their labels; returns also how many images there are."""
        source = self.source
        with naming_file(path), path.open("rb") as file:
            start = file.read(6)
            file.seek(0)
            try:
                if start.startswith(b"\x93NUMPY"):
                    if source.labels is not None:
                        raise SourceError(
                            Code.MISSING_LABELS,
                            f"{path}: a .npy file holds one array; labels need an .npz",
                            field="labels",
                        )
                    images, shape = _read_array(file, path.stat().st_size, limit)
                    labels = None
                elif start.startswith(b"PK\x03\x04"):
                    with zipfile.ZipFile(file) as archive:
                        images, shape = _read_member(archive, path, source.images, limit, "images")
                        labels = None
                        if source.labels is not None:
                            labels, label_shape = _read_member(archive, path, source.labels, limit, "labels")
                else:
                    raise SourceError(
                        Code.INVALID_DATA_FORMAT,
                        f"{path} is neither a .npy nor an .npz file",
                        "write it with numpy.save or numpy.savez",
                    )
            except (
                ValueError,
                EOFError,
                KeyError,
                RuntimeError,
                NotImplementedError,
                zlib.error,
                zipfile.BadZipFile,
            ) as error:
                raise SourceError(
                    Code.INVALID_DATA_FORMAT, f"{path} is not readable as NumPy arrays: {error}"
                ) from None
        if len(shape) not in (3, 4):
            message = f"{path}: {source.images} has shape {shape}; expected [N, H, W] or [N, H, W, C]"
            raise SourceError(Code.INVALID_DATA_FORMAT, message)
        if labels is not None and label_shape != shape[:1]:
            raise SourceError(
                Code.INVALID_DATA_FORMAT, f"{path}: {shape[0]} images but labels of shape {label_shape}", field="labels"
            )
        return images, shape[0], labels

    def _captions(self, path: Path) -> list[Any]:
        found = []
        with naming_file(path):
            for row in read_csv(path):
                if self.source.caption not in row.columns:
                    message = f"{path}: no column {self.source.caption!r}"
                    raise SourceError(Code.MISSING_COLUMN, message, columns_there(row.columns), "caption")
                found.append(row.columns[self.source.caption])
        return found


Shape = tuple[int, ...]


def _read_member(
    archive: zipfile.ZipFile, path: Path, name: str, limit: int | None, key: str
) -> tuple[np.ndarray, Shape]:
    """Read an array of an archive."""
    names = [member.removesuffix(".npy") for member in archive.namelist()]
    if name not in names:
        guess = nearest(name, names)
        advice = f"did you mean {guess}?" if guess else "arrays there: " + ", ".join(names[:12])
        raise SourceError(Code.MISSING_COLUMN, f"{path}: no array {name!r}", advice, key)
    member = archive.infolist()[names.index(name)]
    with archive.open(member) as file:
        return _read_array(file, member.file_size, limit)


def _read_header(file: IO[bytes]) -> tuple[Shape, bool, np.dtype]:
    """Read the header of an array in NumPy's form, a Python literal; raises ValueError."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of NumPy's format holds no plain numbers")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, is_fortran, dtype = read(file)
    except (SyntaxError, TypeError, KeyError, RecursionError, TokenError) as error:
        raise ValueError(f"its header cannot be read ({error})") from None
    if any(length < 0 for length in shape):
        raise ValueError(f"its header says shape {shape}")
    return shape, is_fortran, dtype


def _read_array(file: IO[bytes], size: int, limit: int | None) -> tuple[np.ndarray, Shape]:
    """Read an array in NumPy's form, or its first items; returns also its whole shape. Raises ValueError."""
    shape, is_fortran, dtype = _read_header(file)
    if dtype.hasobject:
        raise ValueError("the array holds Python objects, which are not read")
    there, whole = size - file.tell(), prod(shape) * dtype.itemsize
    if there < whole:
        raise ValueError(f"the array is cut off: {there} bytes of {whole}")
    is_cut = limit is not None and not is_fortran and len(shape) > 0
    read = (min(shape[0], limit), *shape[1:]) if is_cut and limit is not None else shape
    wanted = prod(read) * dtype.itemsize
    data = file.read(wanted) if wanted else b""
    if len(data) != wanted:
        raise ValueError(f"the array is cut off: {len(data)} bytes of {wanted}")
    array = np.frombuffer(data, dtype=dtype, count=prod(read))
    return array.reshape(read, order="F" if is_fortran else "C"), shape
