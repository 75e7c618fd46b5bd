"""Immutable bytes named by their SHA-256; whatever is read back is compared with its name."""

import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from recipes.errors import StoreDamaged
from recipes.models.safetensors_headers import MAX_HEADER_BYTES
from trainers.store.background_threads import map_beside, map_requests
from trainers.store.manifest import FileEntry, sha256_hex
from trainers.store.place import Files, check_entry, hash_buffers, hash_file, reading, writing

REMOTE_CHECK_BYTES = 16 << 20
"""Read at once of an object in an object store whose hash is wanted."""
START_BYTES = 4096
"""Read at once of an object whose header is wanted: most headers are shorter."""

A = TypeVar("A")
B = TypeVar("B")

Mark = tuple[int, ...]
"""Which file was hashed: device, inode, size, time of change in nanoseconds."""


def cache_folder() -> Path:
    """Return the folder for what can be fetched again: $TRAINWRIGHT_CACHE, else ~/.cache/trainwright."""
    given = os.environ.get("TRAINWRIGHT_CACHE")
    return Path(given).absolute() if given else Path.home() / ".cache" / "trainwright"


_SHA256 = re.compile(r"[0-9a-f]{64}")


def object_path(sha256: str) -> str:
    """Return where an object lies in the store; raises StoreDamaged for what is no hash and could lead elsewhere."""
    if not _SHA256.fullmatch(sha256):
        raise StoreDamaged(f"names the object {sha256[:100]!r}, which is not a SHA-256")
    return f"objects/{sha256[:2]}/{sha256[2:]}"


class ObjectStore:
    """The objects of one store."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._verified: dict[str, Mark] = {}
        self._seen_whole: dict[str, tuple[int | None, float | None]] = {}
        """Of objects in an object store: size and age of those that were whole."""

    @property
    def is_remote(self) -> bool:
        """Whether each look costs a request."""
        return self._files.root is None

    def ask(self, action: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
        """Give the results of looks at objects in order, many at once where each costs a request."""
        return map_requests(action, items, self._files)

    @property
    def cache(self) -> Path:
        """Where things lie that can be made again: `cache/` of a local store that is writable, else the user's."""
        local = self._files.local("cache")
        if local is None or not os.access(local.parent, os.W_OK):
            return cache_folder()
        with writing(local):
            local.mkdir(0o770, exist_ok=True)
        return local

    def put_bytes(self, data: bytes) -> str:
        """Store some bytes; returns their hash."""
        return self._files.put([data], object_path, len(data)).sha256

    def put_chunks(self, chunks: Iterable[Any], size: int | None = None) -> FileEntry:
        """Store a sequence of buffers as one object without holding it in memory; `size` is for messages."""
        return self._files.put(chunks, object_path, size)

    def put_file(self, path: Path) -> FileEntry:
        """Store a copy of a local file."""
        return self._files.put_file(path, object_path)

    def put_folder(self, folder: Path) -> dict[str, FileEntry]:
        """Store every file under a folder; logical names are relative to it."""
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        entries = map_beside(self.put_file, paths, 4)
        return {path.relative_to(folder).as_posix(): entry for path, entry in zip(paths, entries, strict=True)}

    def get_bytes(self, sha256: str) -> bytes:
        """Return an object's bytes; raises StoreDamaged when they are missing or not what the name says."""
        path = object_path(sha256)
        try:
            data = self._files.read(path)
        except (FileNotFoundError, NotADirectoryError):
            raise StoreDamaged(f"store {self._files.uri}: {path} is missing") from None
        if sha256_hex(data) != sha256:
            raise StoreDamaged(f"store {self._files.uri}: {path} holds {len(data)} bytes of another hash")
        return data

    def has(self, sha256: str, size: int) -> bool:
        """Tell whether there is an object of that name and size; its bytes are not read."""
        return self._files.size(object_path(sha256)) == size

    def missing(self, entries: Iterable[FileEntry], sizes: Mapping[str, int] | None = None) -> list[FileEntry]:
        """Return those entries that have no object of their size; `sizes` of all objects by path, where listed."""
        wanted = list({entry.sha256: entry for entry in entries}.values())
        if sizes is not None:
            return [entry for entry in wanted if sizes.get(object_path(entry.sha256)) != entry.bytes]
        present = self.ask(lambda entry: self.has(entry.sha256, entry.bytes), wanted)
        return [entry for entry, is_present in zip(wanted, present, strict=True) if not is_present]

    def local_path(self, sha256: str) -> Path:
        """Return a read-only local file with the object's bytes: the object itself, or a copy in the cache folder.

        The bytes are hashed once per process and file; raises StoreDamaged when they are not what the name says.
        """
        path = object_path(sha256)
        own = self._files.local(path)
        if own is not None:
            if self._files.size(path) is None:
                raise StoreDamaged(f"store {self._files.uri}: {path} is missing")
            self._verify_local(sha256, own, path)
            return own
        local = self.cache / path
        if local.exists():
            try:
                self._verify_local(sha256, local, path)
            except StoreDamaged:
                local.unlink(missing_ok=True)
            else:
                return local
        with writing(local):
            local.parent.mkdir(parents=True, exist_ok=True)
        temporary = local.with_name(f".{local.name}.{secrets.token_hex(6)}")
        try:
            self._files.fetch(path, temporary)
            self._verify_local(sha256, temporary, path)
            temporary.chmod(0o444)
            os.replace(temporary, local)
        except FileNotFoundError:
            raise StoreDamaged(f"store {self._files.uri}: {path} is missing") from None
        finally:
            temporary.unlink(missing_ok=True)
        return local

    def verify_all(self, hashes: Sequence[str], threads: int = 1) -> dict[str, Mark]:
        """Hash objects, `threads` at a time; returns which local file each was read from.

        Raises StoreDamaged for the first that is missing or altered.
        """
        list(map_beside(self.local_path, hashes, threads))
        return {sha256: self._verified[sha256] for sha256 in hashes}

    def trust(self, marks: Mapping[str, Mark]) -> None:
        """Take over what another process of this machine has hashed; a file with another mark is hashed here."""
        self._verified.update(marks)

    def check(self, entry: FileEntry) -> None:
        """Read an object whole; raises StoreDamaged when it is not what the entry says."""
        path = object_path(entry.sha256)
        local = self._files.local(path)
        try:
            if local is None:
                found = hash_buffers(self._remote_chunks(path, entry.bytes))
            else:
                with reading(f"store {self._files.uri}: {path}"):
                    found = hash_file(local)
        except FileNotFoundError:
            raise StoreDamaged(f"store {self._files.uri}: {path} is missing") from None
        check_entry(entry, found, f"store {self._files.uri}: {path}")

    def _remote_chunks(self, path: str, size: int) -> Iterator[bytes]:
        """Give an object's bytes in pieces that memory holds, and one byte more where it is longer than `size`."""
        for start in range(0, max(size, 1), REMOTE_CHECK_BYTES):
            stop = start + REMOTE_CHECK_BYTES
            yield self._files.read_range(path, start, stop if stop < size else size + 1)

    def demand_whole(self, entry: FileEntry) -> None:
        """Read an object whole, unless this process knows that it was and it is the same file as then.

        Raises StoreDamaged when it is missing or not what the entry says.
        """
        if not self.is_remote:
            self.local_path(entry.sha256)
            return
        seen = self._look(entry.sha256)
        if self._seen_whole.get(entry.sha256) != seen:
            self.check(entry)
            self._seen_whole[entry.sha256] = seen

    def note_whole(self, entries: Iterable[FileEntry]) -> None:
        """Believe that objects are whole as they lie there: whoever wrote them has just read them back."""
        for entry in entries:
            local = self._files.local(object_path(entry.sha256))
            if local is None:
                self._seen_whole[entry.sha256] = self._look(entry.sha256)
            else:
                self._verified[entry.sha256] = _mark(local.stat())

    def _look(self, sha256: str) -> tuple[int | None, float | None]:
        path = object_path(sha256)
        return self._files.size(path), self._files.modified_at(path)

    def read_header(self, sha256: str) -> bytes | None:
        """Return the JSON header of a safetensors object without reading the rest; None when it is no such object."""
        path = object_path(sha256)
        try:
            start = self._files.read_range(path, 0, START_BYTES)
            length = int.from_bytes(start[:8], "little")
            if length > MAX_HEADER_BYTES:
                return None
            is_more = START_BYTES == len(start) < 8 + length
            rest = self._files.read_range(path, len(start), 8 + length) if is_more else b""
        except FileNotFoundError:
            return None
        return (start + rest)[8 : 8 + length]

    def remove(self, sha256: str) -> None:
        """Remove an object that nothing names, and its copy in the cache."""
        self.forget(sha256)
        self._files.remove(object_path(sha256))

    def forget(self, sha256: str) -> None:
        """Drop what this process and the cache know of an object that is gone."""
        self._verified.pop(sha256, None)
        self._seen_whole.pop(sha256, None)
        if self._files.root is None:
            (self.cache / object_path(sha256)).unlink(missing_ok=True)

    def _verify_local(self, sha256: str, local: Path, path: str) -> None:
        with reading(f"store {self._files.uri}: {path}"):
            self._hash_local(sha256, local, path)

    def _hash_local(self, sha256: str, local: Path, path: str) -> None:
        found = local.stat()
        mark = _mark(found)
        if self._verified.get(sha256) == mark:
            return
        if hash_file(local).sha256 != sha256:
            raise StoreDamaged(f"store {self._files.uri}: {path} holds {found.st_size} bytes of another hash")
        self._verified[sha256] = mark


def _mark(found: os.stat_result) -> Mark:
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
