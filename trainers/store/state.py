"""Tensors of a training state: every rank writes its pieces as safetensors objects, any piece can be read back.

The header of each object carries its owner's mark (run, stage, lease, step), so a state shares no object with another
one and retention can delete a dropped state's objects without asking who else names them.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from recipes.errors import StoreDamaged
from trainers.store.background_threads import map_beside
from trainers.store.commit_rules import owner_mark
from trainers.store.manifest import Dtype, Slice, StateManifest, TensorEntry, merge_entries
from trainers.store.objects import object_path
from trainers.store.store import Store

OBJECT_BYTES = 128 << 20
"""Pieces are gathered into objects of about this size."""
OBJECTS_AT_ONCE = 2
"""One is written and hashed while the disk syncs another."""

DTYPES: dict[torch.dtype, Dtype] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""safetensors' names."""

_TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


class Piece(Protocol):
    """A run of one logical tensor in row-major order: elements [start, start + values.numel())."""

    @property
    def group(self) -> str:
        """param, exp_avg, ..."""

    @property
    def name(self) -> str:
        """The logical tensor's name."""

    @property
    def shape(self) -> Sequence[int]:
        """The logical tensor's shape."""

    @property
    def start(self) -> int:
        """First element."""

    @property
    def values(self) -> Tensor:
        """The elements."""


def write_tensors(
    store: Store, pieces: Iterable[Piece], *, run: str, stage: str, lease: int, step: int
) -> dict[str, list[TensorEntry]]:
    """Store pieces durably; returns their entries in the manifest. `merge_entries` joins those of all ranks."""
    owner = owner_mark(run, stage, lease, step)
    return merge_entries(
        map_beside(lambda batch: _write_object(store, batch, owner), _batches(pieces), OBJECTS_AT_ONCE)
    )


class TensorReader:
    """Reads ranges of a state's tensors; every object is hash-checked before its first byte is used."""

    def __init__(self, store: Store, manifest: StateManifest) -> None:
        self._store = store
        self._entries = {(group, entry.name): entry for group, items in manifest.tensors.items() for entry in items}
        self._open: dict[str, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "TensorReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.clear()
        self._stack.close()

    def names(self, group: str) -> list[str]:
        """Return the names of a group's tensors."""
        return [name for found, name in self._entries if found == group]

    def entry(self, group: str, name: str) -> TensorEntry:
        """Return a tensor's entry; raises StoreDamaged when the state lacks it."""
        try:
            return self._entries[group, name]
        except KeyError:
            raise StoreDamaged(f"the training state has no tensor {group}:{name}") from None

    def read(self, group: str, name: str) -> Tensor:
        """Return a whole tensor."""
        entry = self.entry(group, name)
        return self.read_range(group, name, 0, math.prod(entry.shape)).reshape(entry.shape)

    def read_range(self, group: str, name: str, start: int, stop: int) -> Tensor:
        """Return elements [start, stop) of the flattened tensor; a view of the file where one piece holds them all."""
        entry = self.entry(group, name)
        if not 0 <= start <= stop <= math.prod(entry.shape):
            raise ValueError(f"{group}:{name} has {math.prod(entry.shape)} elements, not [{start}, {stop})")
        if any(len(piece.start) != 1 for piece in entry.slices):
            return self._assemble(entry).flatten()[start:stop]
        for piece in entry.slices:
            if piece.start[0] <= start and stop <= piece.start[0] + piece.shape[0]:
                whole: Tensor = self._tensor(piece, entry)[start - piece.start[0] : stop - piece.start[0]]
                return whole
        result = torch.empty(stop - start, dtype=_TORCH_DTYPES[entry.dtype])
        for piece in entry.slices:
            first, last = max(start, piece.start[0]), min(stop, piece.start[0] + piece.shape[0])
            if first < last:
                values = self._tensor(piece, entry)[first - piece.start[0] : last - piece.start[0]]
                result[first - start : last - start] = values
        return result

    def _assemble(self, entry: TensorEntry) -> Tensor:
        result = torch.empty(entry.shape, dtype=_TORCH_DTYPES[entry.dtype])
        for piece in entry.slices:
            values = self._tensor(piece, entry)[:]
            if len(piece.start) == 1 and len(entry.shape) != 1:
                result.view(-1)[piece.start[0] : piece.start[0] + piece.shape[0]] = values
            else:
                box = tuple(slice(at, at + size) for at, size in zip(piece.start, piece.shape, strict=True))
                result[box] = values.reshape(piece.shape)
        return result

    def _tensor(self, piece: Slice, entry: TensorEntry) -> Any:
        found = self._open.get(piece.object.sha256)
        if found is None:
            path: Path = self._store.objects.local_path(piece.object.sha256)
            try:
                found = self._stack.enter_context(safe_open(path, framework="pt"))
            except SafetensorError as error:
                raise StoreDamaged(f"{path}, which holds {entry.name}, is not a safetensors file: {error}") from None
            self._open[piece.object.sha256] = found
        try:
            view = found.get_slice(piece.key)
        except SafetensorError as error:
            raise StoreDamaged(f"{object_path(piece.object.sha256)} does not hold {entry.name}: {error}") from None
        if view.get_shape() != list(piece.shape) or view.get_dtype() != entry.dtype:
            raise StoreDamaged(
                f"{object_path(piece.object.sha256)} holds {entry.name} as {view.get_dtype()} {view.get_shape()}, "
                f"not {entry.dtype} {piece.shape}"
            )
        return view


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += piece.values.numel() * piece.values.element_size()
        if size >= OBJECT_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write_object(store: Store, pieces: Sequence[Piece], owner: str) -> dict[str, list[TensorEntry]]:
    """Write pieces as one safetensors object, a tensor at a time."""
    header: dict[str, Any] = {"__metadata__": {"owner": owner}}
    offset = 0
    for piece in pieces:
        size = piece.values.numel() * piece.values.element_size()
        header[_key(piece)] = {
            "dtype": DTYPES[piece.values.dtype],
            "shape": [piece.values.numel()],
            "data_offsets": [offset, offset + size],
        }
        offset += size
    if len(header) != len(pieces) + 1:
        raise ValueError("two pieces of one state start at the same element of the same tensor")
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    # A list, not an iterator: a write that finds no room is repeated.
    chunks: list[Any] = [len(text).to_bytes(8, "little") + text]
    for piece in pieces:
        if piece.values.numel():
            chunks.append(piece.values.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    written = store.objects.put_chunks(chunks, 8 + len(text) + offset)
    entries: dict[str, list[TensorEntry]] = {}
    for piece in pieces:
        part = Slice(start=[piece.start], shape=[piece.values.numel()], object=written, key=_key(piece))
        entry = TensorEntry(name=piece.name, shape=list(piece.shape), dtype=DTYPES[piece.values.dtype], slices=[part])
        entries.setdefault(piece.group, []).append(entry)
    return entries


def _key(piece: Piece) -> str:
    return f"{piece.group}:{piece.name}:{piece.start}"
