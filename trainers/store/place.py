"""Where a store's files lie: what a place has to offer, and which place an address means."""

import errno
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from recipes.errors import CapacityError, RequestError, StoreDamaged
from trainers.store.manifest import FileEntry

CHUNK_BYTES = 1 << 20
REMOTE_PROTOCOLS = ("s3", "gs", "memory")
FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors that pass when somebody makes room."""
UNREADABLE = (errno.EIO, errno.EUCLEAN, errno.ESTALE, errno.EISDIR)
"""Errors of a disk that has a file and cannot give its bytes, or has a folder there."""
_NO_RIGHT = "see whose it is, and whether you may enter the folders above it: ls -ld"
_HANDLES = "raise the limit of open files: ulimit -n"
ADVICE = {
    errno.EACCES: _NO_RIGHT,
    errno.EPERM: _NO_RIGHT,
    errno.EROFS: "it is mounted read-only: mount it otherwise, or use another folder",
    errno.ENOSPC: "make room, or use a folder on another disk: df -h; df -i",
    errno.EDQUOT: "make room, or have the quota raised: quota",
    errno.EMFILE: _HANDLES,
    errno.ENFILE: _HANDLES,
    errno.EIO: "the disk fails: see dmesg",
    errno.ESTALE: "the server of this mount has changed: mount it again",
    errno.ENAMETOOLONG: "use a shorter path",
}
"""What to do about an error of the system."""
FIRST_WAIT_S, LAST_WAIT_S = 0.2, 5.0

Place = Callable[[str], str]
"""Gives the path of an object from its hash."""


class StoreFull(CapacityError):  # noqa: N818
    """A write found no room; the message names path, needed and free bytes. `errno` tells a full disk from a quota."""

    errno = errno.ENOSPC


@dataclass(frozen=True)
class Patience:
    """How a process meets a full store: writes that find no room are tried again until there is some."""

    limit_s: float
    tell: Callable[[str], None]
    """Hears why the writer waits, and that it continues."""

    def wait(self, refusal: CapacityError, waited_s: float) -> float:
        """Sleep before the next try; returns the seconds waited so far. Raises the refusal past the limit."""
        if waited_s >= self.limit_s:
            raise refusal
        if waited_s == 0:
            self.tell(f"{refusal}; waiting for room, at most {self.limit_s:.0f} s")
        pause = min(max(FIRST_WAIT_S, waited_s / 2), LAST_WAIT_S, self.limit_s - waited_s)
        time.sleep(pause)
        return waited_s + pause


class Files(Protocol):
    """Files by relative path. Whatever a call has returned survives a power cut; no reader sees half a file.

    Writes raise CapacityError when the place cannot take them (StoreFull for want of room), reads raise
    FileNotFoundError, and StoreDamaged for what the disk cannot give, both StoreUntrusted for what others may have
    written.
    """

    uri: str
    patience: Patience | None
    """None: a full place is refused at once."""

    @property
    def root(self) -> Path | None:
        """The local folder; None for an object store."""

    def create(self, path: str, data: bytes, *, durable: bool = True) -> bool:
        """Write a file if there is none of that name; of several racing writers (with unequal bytes) one gets True."""

    def put(self, chunks: Iterable[Any], place: Place, size: int | None = None) -> FileEntry:
        """Write an object under the name that its hash gives; a whole one that is there already is renewed.

        On an object store it is read back and hashed: nothing else says that the bytes arrived as they were sent.

        `size` is for the message when there is no room. An iterator can be read once and so is not tried again.
        """

    def put_file(self, source: Path, place: Place) -> FileEntry:
        """Write a copy of a local file as an object."""

    def local(self, path: str) -> Path | None:
        """Return where a path of a local store lies, whether or not it is there; None for an object store.

        Raises StoreUntrusted when others may have written it, or when it leads out of the store.
        """

    def read(self, path: str) -> bytes:
        """Return a file's bytes."""

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        """Return some of a file's bytes; fewer where it ends."""

    def size(self, path: str) -> int | None:
        """Return a file's size; None: there is none."""

    def modified_at(self, path: str) -> float | None:
        """Return when a file was written or renewed, in seconds by the clock of the place; None: there is none."""

    def fetch(self, path: str, target: Path) -> None:
        """Copy a file to a local path."""

    def names(self, path: str) -> list[str]:
        """Return the sorted names in a folder; none when it is missing."""

    def walk(self, path: str) -> Iterator[str]:
        """Give the paths of all files under a folder, sorted."""

    def sizes(self, path: str) -> dict[str, int]:
        """Return the size of every file under a folder, by path; on an object store this is one listing."""

    def remove(self, path: str) -> None:
        """Remove a file durably; a missing one is no error."""

    def remove_stale(self, path: str, modified_at: float) -> bool:
        """Remove a file that nobody renewed since `modified_at`; tells whether it went."""

    def recover(self) -> None:
        """Put back what a killed `remove_stale` had moved aside and not yet judged."""

    def settle(self, path: str) -> None:
        """Make a file durable that another writer may have created a moment ago."""

    def free_bytes(self) -> int | None:
        """Return the space left; None where it is not limited."""

    def sweep(self) -> None:
        """Remove what dead writers left half written."""


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Raise StoreDamaged naming a stored file that the disk cannot give: an older one may be whole.

    Any other error of the system becomes a CapacityError that says what to do, but that there is no such file.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        kind = StoreDamaged if error.errno in UNREADABLE else CapacityError
        raise kind(f"{what} cannot be read: {why(error)}") from error


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Raise CapacityError naming a place outside the store's own folders that cannot be written, and what to do."""
    try:
        yield
    except OSError as error:
        raise CapacityError(f"{error.filename or place} cannot be written: {why(error)}") from error


def demand_empty(folder: Path) -> None:
    """Raise RequestError unless there is nothing at a place, or an empty folder; CapacityError where none can be."""
    with writing(folder):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise RequestError(f"{folder} exists and is not an empty folder")


def why(error: OSError) -> str:
    """Say what the system answered, and what to do about it."""
    advice = ADVICE.get(error.errno or 0)
    return f"{error.strerror or error}{f' ({advice})' if advice else ''}"


def file_chunks(path: Path) -> Iterator[bytes]:
    """Give a file's bytes in pieces."""
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


class Hashing:
    """Buffers on their way to somewhere; each is hashed as it passes."""

    def __init__(self, chunks: Iterable[Any]) -> None:
        self._chunks = chunks
        self._digest, self._size = hashlib.sha256(), 0

    def __iter__(self) -> Iterator[memoryview]:
        for chunk in self._chunks:
            view = memoryview(chunk).cast("B")
            self._digest.update(view)
            self._size += len(view)
            yield view

    @property
    def entry(self) -> FileEntry:
        """Hash and size of what has passed."""
        return FileEntry(sha256=self._digest.hexdigest(), bytes=self._size)


def hash_buffers(chunks: Iterable[Any]) -> FileEntry:
    """Return hash and size of the bytes of some buffers."""
    passing = Hashing(chunks)
    for _ in passing:
        pass
    return passing.entry


def hash_file(path: Path) -> FileEntry:
    """Return a local file's hash and size."""
    return hash_buffers(file_chunks(path))


def check_entry(entry: FileEntry, found: FileEntry, path: str) -> None:
    """Raise StoreDamaged unless what was read is what the entry names."""
    if found != entry:
        raise StoreDamaged(
            f"{path}: {found.bytes} bytes of hash {found.sha256[:12]}, expected {entry.bytes} of {entry.sha256[:12]}"
        )
