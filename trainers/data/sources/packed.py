"""Packed files, told by their first bytes or their names."""

import bz2
import errno
import gzip
import io
import lzma
import zlib
from pathlib import Path
from typing import IO, cast

PACKED_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""What reading a packed file may raise."""
_MAGIC = {"gz": b"\x1f\x8b", "bz2": b"BZh", "xz": b"\xfd7zXZ\x00", "zst": b"\x28\xb5\x2f\xfd"}
"""First bytes of packed files."""


def open_packed(path: Path) -> IO[bytes]:
    """Open a file, unpacked where its first bytes or its name say that it is packed (gzip, bzip2, xz, Zstandard).

    Raises OSError for a pipe, which nobody may ever write to.
    """
    if not path.is_file():
        raise OSError(errno.EINVAL, "no regular file", str(path))
    with path.open("rb") as file:
        start = file.read(6)
    packing = next((name for name, magic in _MAGIC.items() if start.startswith(magic)), path.suffix[1:])
    match packing:
        case "gz":
            return cast(IO[bytes], gzip.open(path, "rb"))
        case "bz2":
            return cast(IO[bytes], bz2.open(path, "rb"))
        case "xz":
            return cast(IO[bytes], lzma.open(path, "rb"))
        case "zst":
            import pyarrow

            return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return path.open("rb")
