"""Files in the IDX format of MNIST."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from math import prod
from pathlib import Path

import numpy as np

from recipes.data.images import Idx
from recipes.problem_codes import Code
from trainers.data.sources.local_files import (
    Found,
    file_parts,
    files_digest,
    find_each,
    naming_file,
    require,
)
from trainers.data.sources.packed import open_packed
from trainers.data.sources.reader import ListedFiles, Part, RawRow, SourceError

MAX_FIRST_BYTES = 2**28
"""No more is read of a file of which only the first images are wanted."""


@dataclass(frozen=True, slots=True)
class IdxReader:
    """Reads IDX files: columns image and label, without label_files image alone."""

    source: Idx
    base_dir: Path
    is_remote = False

    def parts(self) -> Iterator[Part]:
        """Yield the files of images, each with its labels."""
        images, labels = self._images(), self._labels()
        yield from file_parts((found for found in labels if isinstance(found[1], SourceError)), no_rows)
        for found, label_file in zip_longest(images, labels):
            if found is not None:
                path = label_file[1] if label_file is not None else None
                yield from file_parts([found], partial(self._read, path if isinstance(path, Path) else None))

    def digest(self) -> str:
        """Hash the bytes of images and labels, in the order of the recipe."""
        files = self.files().by_key
        return hashlib.sha256(json.dumps([files_digest(paths) for paths in files.values()]).encode()).hexdigest()

    def files(self) -> ListedFiles:
        """Return the files of images and of labels."""
        return ListedFiles({"files": require(self._images()), "label_files": require(self._labels())})

    def _images(self) -> list[Found]:
        return find_each(self.source.files, self.base_dir)

    def _labels(self) -> list[Found]:
        return demand_one_each(
            find_each(self.source.label_files, self.base_dir, "label_files"), self._images(), "label_files"
        )

    def _read(self, label_file: Path | None, path: Path, limit: int | None) -> Iterator[RawRow]:
        images, count = _read_array(path, 3, limit)
        labels = None
        if label_file is not None:
            with naming_file(label_file):
                labels, num_labels = _read_array(label_file, 1, limit)
            if num_labels != count:
                message = f"{label_file} has {num_labels} labels, {path} {count} images"
                raise SourceError(Code.FILE_COUNT_MISMATCH, message, field="label_files")
        for number, pixels in enumerate(images):
            columns = {"image": pixels} if labels is None else {"image": pixels, "label": int(labels[number])}
            yield RawRow(f"{path.name}:{number}", f"{path}: image {number}", columns, path.parent)


def demand_one_each(found: list[Found], images: list[Found], key: str) -> list[Found]:
    """Return files that belong to files of images; SourceError in place of the first where there are not as many."""
    is_whole = not any(isinstance(path, SourceError) for _, path in [*found, *images])
    if found and is_whole and len(found) != len(images):
        message = f"{len(found)} files; expected one file for each of the {len(images)} in files"
        return [(key, SourceError(Code.FILE_COUNT_MISMATCH, message, field=key))]
    return found


def no_rows(path: Path, limit: int | None) -> Iterator[RawRow]:
    """Read nothing: what is wrong is said in place of the file."""
    yield from ()


def _read_array(path: Path, dimensions: int, limit: int | None) -> tuple[np.ndarray, int]:
    """Read an IDX file, or its first items; returns also how many it has.

    00 00 08 (unsigned byte), the number of dimensions, their sizes big-endian, the values.
    """
    with open_packed(path) as file:
        head = file.read(4 + 4 * dimensions)
        if len(head) < 4 + 4 * dimensions or head[:3] != b"\x00\x00\x08" or head[3] != dimensions:
            what = f"an IDX file of unsigned bytes with {dimensions} dimensions"
            raise SourceError(
                Code.INVALID_DATA_FORMAT, f"{path} is not {what} (it starts with {head[:4].hex() or 'nothing'})"
            )
        shape = [int(size) for size in np.frombuffer(head, dtype=">u4", offset=4)]
        count = shape[0] if limit is None else min(limit, shape[0])
        wanted = count * prod(shape[1:])
        data = file.read() if limit is None else file.read(min(wanted, MAX_FIRST_BYTES))
    there = len(data)
    if path.suffix != ".gz":
        there = path.stat().st_size - len(head)
        wanted = prod(shape)
    if there != wanted:
        raise SourceError(Code.INVALID_DATA_FORMAT, f"{path} is cut off: {there} bytes of {'x'.join(map(str, shape))}")
    return np.frombuffer(data, dtype=np.uint8).reshape(count, *shape[1:]), shape[0]
