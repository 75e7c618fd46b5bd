"""The identity of rows that name images: the rows' own, and the bytes of the image files that they name."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from recipes.data.text import PlainSource, Source
from trainers.data.row_images import find_images, find_origin, read_image
from trainers.data.rows import column_names
from trainers.data.source_digest import joined_digest
from trainers.data.sources.open import open_source
from trainers.data.sources.reader import RawRow, read_all


def image_text_digest(source: Source, base_dir: Path) -> str:
    """Return 64 hex digits that change when the rows can change, or the files of images that they name."""
    return joined_digest(source, base_dir, lambda own: _digest(cast(PlainSource, own), base_dir))


def _digest(source: PlainSource, base_dir: Path) -> str:
    reader = open_source(source, base_dir, "image_text")
    digest = hashlib.sha256(reader.digest().encode())
    known: dict[Path, bytes] = {}
    for raw in read_all(reader):
        for path in named_images(raw, source):
            origin = raw.folder / path
            if origin not in known:
                known[origin] = hashlib.sha256(read_image(origin, raw.place)).digest()
            digest.update(known[origin])
    return digest.hexdigest()


def named_images(raw: RawRow, source: PlainSource) -> Iterator[Path]:
    """Yield the files of images that a row names, as it names them."""
    for image in find_images(raw.columns, column_names(source)) or ():
        origin = find_origin(image, Path(), raw.place)
        if isinstance(origin, Path):
            yield origin
