"""The header of a safetensors file, compared with its size before any library opens it."""

import json
from pathlib import Path
from typing import Any

MAX_HEADER_BYTES = 100_000_000
"""Longest header that the safetensors format allows."""

_DTYPE_BITS = {
    "F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
    "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8,
}  # fmt: skip


def read_shapes(folder: Path, weights: str = "model.safetensors") -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model folder's tensors by name, those of all shards; raises ValueError naming the file.

    The data is not read; a file that is missing or does not match its header is an error.
    """
    index = folder / f"{weights}.index.json"
    shards: dict[str, set[str]] = {weights: set()}
    if not (folder / weights).is_file():
        try:
            found = json.loads(index.read_bytes())["weight_map"]
            shards = {shard: set() for shard in found.values()}
            for name, shard in found.items():
                shards[shard].add(name)
        except FileNotFoundError:
            raise ValueError(f"{folder}: no {weights}") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"{index}: not readable as an index of shards") from None
    shapes: dict[str, tuple[int, ...]] = {}
    for shard, names in shards.items():
        try:
            header = read_header(folder / shard)
        except FileNotFoundError:
            raise ValueError(f"{index} names {shard}, which is missing") from None
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder / shard} {error}") from None
        if names and names != header.keys():
            raise ValueError(f"{folder / shard} and {index.name} disagree about {min(names ^ header.keys())}")
        shapes |= {name: tuple(entry["shape"]) for name, entry in header.items()}
    return shapes


def read_header(path: Path) -> dict[str, Any]:
    """Return the tensors of a local safetensors file by name; raises ValueError unless the file is exactly that.

    The data is not read. Demanded is what `parse_header` demands, and a header of sane length.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(f"is not a safetensors file: header of {length} bytes in a file of {size}")
        text = file.read(length)
    return parse_header(text, size)


def parse_header(text: bytes, size: int) -> dict[str, Any]:
    """Return the tensors of a safetensors file of `size` bytes with this header; ValueError unless they fill it.

    Demanded: JSON without duplicate keys, known dtypes, sizes that fit shapes, and data without gap, overlap or rest.
    """
    try:
        header = json.loads(text, object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not a safetensors file: {error}") from None
    if not isinstance(header, dict):
        raise ValueError("is not a safetensors file: its header is no object")
    header.pop("__metadata__", None)
    spans = []
    for name, entry in header.items():
        try:
            begin, end = entry["data_offsets"]
            shape, bits = entry["shape"], _DTYPE_BITS[entry["dtype"]]
            count = 1
            for side in shape:
                if type(side) is not int or side < 0:
                    raise ValueError("shape")
                count *= side
            if type(begin) is not int or type(end) is not int or (end - begin) * 8 != count * bits:
                raise ValueError("offsets")
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"has an entry for tensor {name!r} that does not hold together") from None
        spans.append((begin, end))
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise ValueError(f"has tensors whose data overlaps or leaves a gap at byte {min(begin, position)}")
        position = end
    accounted = 8 + len(text) + position
    if accounted != size:
        raise ValueError(f"has {size} bytes; its header accounts for {accounted}")
    return header


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object; ValueError when a key is given twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is given twice")
    return found
