"""The size of pictures as the headers of their files tell it."""

import gzip
import struct
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from recipes.data.image_facts import PictureFacts, find_picture_facts
from recipes.data.images import ImageSource

SOURCE: TypeAdapter[ImageSource] = TypeAdapter(ImageSource)


def _write(folder: Path) -> None:
    (folder / "a-idx3-ubyte.gz").write_bytes(gzip.compress(struct.pack(">4I", 0x803, 5, 28, 20) + bytes(9)))
    (folder / "p" / "x").mkdir(parents=True)
    (folder / "p" / "x" / "1.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBB", 13, b"IHDR", 12, 6, 8, 6) + bytes(3)
    )
    header = "{'descr': '|u1', 'fortran_order': False, 'shape': (7, 9, 11, 3), }"
    (folder / "a.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode())
    (folder / "broken.npy").write_bytes(b"\x93NUMPY")


@pytest.mark.parametrize(
    ("source", "facts"),
    [
        ({"source": "digits"}, PictureFacts(1, 8, 8)),
        ({"source": "digits", "size": 16, "channels": 3}, PictureFacts(3, 16, 16)),
        ({"source": "idx", "files": ["a-idx3-ubyte.gz"]}, PictureFacts(1, 28, 20)),
        ({"source": "idx", "files": ["none.gz"]}, None),
        ({"source": "image-folder", "path": "p"}, PictureFacts(4, 6, 12)),
        ({"source": "arrays", "files": ["a.npy"], "channels": 1}, PictureFacts(1, 9, 11)),
        ({"source": "arrays", "files": ["broken.npy"]}, None),
        ({"source": "parquet", "files": ["a.parquet"]}, None),
        ({"source": "parquet", "files": ["a.parquet"], "size": 32, "channels": 3}, PictureFacts(3, 32, 32)),
    ],
)
def test_headers_tell_the_size(tmp_path: Path, source: dict[str, Any], facts: PictureFacts | None) -> None:
    _write(tmp_path)
    assert find_picture_facts(SOURCE.validate_python(source), tmp_path) == facts
