"""The size of images as the first one of a source tells it."""

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import TypeAdapter

from recipes.data.images import ImageSetFacts, ImageSource
from trainers.data.images import find_image_set_facts

SOURCE: TypeAdapter[ImageSource] = TypeAdapter(ImageSource)


def _write(folder: Path) -> None:
    head = struct.pack(">4I", 0x803, 5, 28, 20)
    (folder / "a-idx3-ubyte.gz").write_bytes(gzip.compress(head + bytes(5 * 28 * 20)))
    (folder / "p" / "x").mkdir(parents=True)
    Image.new("RGBA", (12, 6)).save(folder / "p" / "x" / "1.png")
    Image.new("RGB", (5, 4)).save(folder / "p" / "x" / "2.jpg")
    np.save(folder / "a.npy", np.zeros((7, 9, 11, 3), np.uint8))
    (folder / "broken.npy").write_bytes(b"\x93NUMPY")
    (folder / "rows.jsonl").write_text('{"image": "p/x/2.jpg"}\nnot JSON')


@pytest.mark.parametrize(
    ("source", "facts"),
    [
        ({"source": "digits"}, ImageSetFacts(1, 8, 8)),
        ({"source": "digits", "size": 16, "channels": 3}, ImageSetFacts(3, 16, 16)),
        ({"source": "idx", "files": ["a-idx3-ubyte.gz"]}, ImageSetFacts(1, 28, 20)),
        ({"source": "idx", "files": ["none.gz"]}, None),
        ({"source": "image-folder", "path": "p"}, ImageSetFacts(4, 6, 12)),
        ({"source": "arrays", "files": ["a.npy"], "channels": 1}, ImageSetFacts(1, 9, 11)),
        ({"source": "arrays", "files": ["broken.npy"]}, None),
        ({"source": "parquet", "files": ["a.parquet"]}, None),
        ({"source": "jsonl", "files": ["rows.jsonl"]}, ImageSetFacts(3, 4, 5)),
        ({"source": "datasets", "path": "org/name", "revision": "main"}, None),
        ({"source": "parquet", "files": ["a.parquet"], "size": 32, "channels": 3}, ImageSetFacts(3, 32, 32)),
    ],
)
def test_the_first_image_tells_the_size(tmp_path: Path, source: dict[str, Any], facts: ImageSetFacts | None) -> None:
    _write(tmp_path)
    assert find_image_set_facts(SOURCE.validate_python(source), tmp_path) == facts
