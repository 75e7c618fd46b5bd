"""Where a store's files lie: a POSIX folder, or an object store through fsspec; both write durably and create-only."""

import fcntl
import hashlib
import os
import secrets
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from recipes.errors import CapacityError, RequestError, StoreDamaged
from trainers.store.manifest import FileEntry

CHUNK_BYTES = 1 << 20
REMOTE_CHUNK_BYTES = 16 << 20
REMOTE_PROTOCOLS = ("s3", "gs", "memory")
STALE_SECONDS = 60.0
"""A temporary file older than this that nobody holds locked was left by a dead writer."""

Place = Callable[[str], str]
"""Gives the path of an object from its hash."""


class Files(Protocol):
    """Files by relative path. Whatever a call has returned survives a power cut; no reader sees half a file.

    Writes raise CapacityError when the place cannot take them, reads raise FileNotFoundError.
    """

    uri: str

    @property
    def root(self) -> Path | None:
        """The local folder; None for an object store."""

    def create(self, path: str, data: bytes, *, durable: bool = True) -> bool:
        """Write a file if there is none of that name; of several racing writers (with unequal bytes) one gets True."""

    def put(self, chunks: Iterable[Any], place: Place) -> FileEntry:
        """Write an object under the name that its hash gives; a whole one that is there already stays."""

    def put_file(self, source: Path, place: Place) -> FileEntry:
        """Write a copy of a local file as an object."""

    def read(self, path: str) -> bytes:
        """Return a file's bytes."""

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        """Return some of a file's bytes; fewer where it ends."""

    def size(self, path: str) -> int | None:
        """Return a file's size; None: there is none."""

    def fetch(self, path: str, target: Path) -> None:
        """Copy a file to a local path."""

    def names(self, path: str) -> list[str]:
        """Return the sorted names in a folder; none when it is missing."""

    def walk(self, path: str) -> Iterator[str]:
        """Give the paths of all files under a folder, sorted."""

    def remove(self, path: str) -> None:
        """Remove a file durably; a missing one is no error."""

    def settle(self, path: str) -> None:
        """Make a file durable that another writer may have created a moment ago."""

    def free_bytes(self) -> int | None:
        """Return the space left; None where it is not limited."""

    def sweep(self) -> None:
        """Remove what dead writers left half written."""


def open_files(uri: str) -> Files:
    """Open a folder (path or file://) or an object store (s3://, gs://, memory://); creates nothing."""
    parts = urlsplit(uri)
    if parts.scheme in ("", "file"):
        path = parts.path if parts.scheme else uri
        if not path or "\x00" in uri or (parts.scheme and parts.netloc):
            raise RequestError(f"store {uri!r} is not a folder or an address like s3://bucket/prefix")
        return LocalFiles(Path(path).expanduser().absolute())
    if parts.scheme not in REMOTE_PROTOCOLS:
        known = ", ".join(f"{name}://" for name in REMOTE_PROTOCOLS)
        raise RequestError(f"store {uri!r}: {parts.scheme}:// is not supported; use a folder, {known}")
    return RemoteFiles(uri)


def file_chunks(path: Path) -> Iterator[bytes]:
    """Give a file's bytes in pieces."""
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def hash_file(path: Path) -> FileEntry:
    """Return a local file's hash and size."""
    digest, size = hashlib.sha256(), 0
    for chunk in file_chunks(path):
        digest.update(chunk)
        size += len(chunk)
    return FileEntry(sha256=digest.hexdigest(), bytes=size)


class LocalFiles:
    """A folder on a POSIX file system with hard links: local disk, tmpfs, NFS."""

    def __init__(self, root: Path) -> None:
        self.root: Path = root
        self.uri = str(root)
        self._durable_folders: set[str] = set()

    def create(self, path: str, data: bytes, *, durable: bool = True) -> bool:
        final = self.root / path
        if final.exists():
            return False
        with self._writing(path, len(data)):
            temporary, _ = self._write_temporary([data], durable)
            try:
                return self._link(temporary, final, durable)
            finally:
                os.unlink(temporary)

    def put(self, chunks: Iterable[Any], place: Place) -> FileEntry:
        with self._writing("an object", None):
            temporary, entry = self._write_temporary(chunks, True)
            try:
                final = self.root / place(entry.sha256)
                while not self._link(temporary, final, True):
                    if self._is_whole(final, entry):
                        self._sync_folder(final.parent)
                        break
                    self._quarantine(final)
            finally:
                os.unlink(temporary)
        return entry

    def put_file(self, source: Path, place: Place) -> FileEntry:
        return self.put(file_chunks(source), place)

    def read(self, path: str) -> bytes:
        return (self.root / path).read_bytes()

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        with (self.root / path).open("rb") as file:
            file.seek(start)
            return file.read(stop - start)

    def size(self, path: str) -> int | None:
        try:
            found = os.stat(self.root / path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def fetch(self, path: str, target: Path) -> None:
        shutil.copyfile(self.root / path, target)

    def names(self, path: str) -> list[str]:
        try:
            return sorted(os.listdir(self.root / path))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def walk(self, path: str) -> Iterator[str]:
        for name in self.names(path):
            child = f"{path}/{name}"
            if (self.root / child).is_dir() and not (self.root / child).is_symlink():
                yield from self.walk(child)
            else:
                yield child

    def remove(self, path: str) -> None:
        with self._writing(path, 0), suppress(FileNotFoundError):
            os.unlink(self.root / path)
            self._sync_folder((self.root / path).parent)

    def settle(self, path: str) -> None:
        with self._writing(path, 0):
            self._sync_folder((self.root / path).parent)

    def free_bytes(self) -> int | None:
        place = self.root
        while not place.exists():
            place = place.parent
        found = os.statvfs(place)
        return found.f_bavail * found.f_frsize

    def sweep(self) -> None:
        for name in self.names("tmp"):
            path = self.root / "tmp" / name
            with suppress(OSError):
                if time.time() - path.stat().st_mtime < STALE_SECONDS:
                    continue
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(path)
                finally:
                    os.close(descriptor)

    def _write_temporary(self, chunks: Iterable[Any], durable: bool) -> tuple[Path, FileEntry]:
        folder = self.root / "tmp"
        self._make_folder(folder, durable=False)
        temporary = folder / secrets.token_hex(12)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with suppress(OSError):  # without locks nothing is swept
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            digest, size = hashlib.sha256(), 0
            for chunk in chunks:
                view = memoryview(chunk).cast("B")
                digest.update(view)
                size += len(view)
                while view:
                    view = view[os.write(descriptor, view) :]
            os.fchmod(descriptor, 0o444)
            if os.fstat(descriptor).st_size != size:
                raise OSError("short write")
            if durable:
                os.fsync(descriptor)
        except BaseException:
            os.unlink(temporary)
            raise
        finally:
            os.close(descriptor)
        return temporary, FileEntry(sha256=digest.hexdigest(), bytes=size)

    def _link(self, temporary: Path, final: Path, durable: bool) -> bool:
        self._make_folder(final.parent, durable)
        try:
            os.link(temporary, final)
        except FileExistsError:
            return False
        except FileNotFoundError:  # the folder was removed since this process made it
            self._durable_folders.clear()
            self._make_folder(final.parent, durable)
            try:
                os.link(temporary, final)
            except FileExistsError:
                return False
        if durable:
            self._sync_folder(final.parent)
        return True

    def _make_folder(self, folder: Path, durable: bool) -> None:
        """Make a folder; a durable one is known to its parent on disk, whoever made it."""
        if str(folder) in self._durable_folders:
            return
        if folder != self.root:
            self._make_folder(folder.parent, durable)
        folder.mkdir(parents=True, exist_ok=True)
        if durable:
            self._sync_folder(folder.parent)
            self._durable_folders.add(str(folder))

    def _sync_folder(self, folder: Path) -> None:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _is_whole(self, path: Path, entry: FileEntry) -> bool:
        try:
            return path.stat().st_size == entry.bytes and hash_file(path) == entry
        except FileNotFoundError:
            return False

    def _quarantine(self, path: Path) -> None:
        folder = self.root / "quarantine"
        self._make_folder(folder, durable=True)
        with suppress(FileNotFoundError):
            os.rename(path, folder / f"{path.parent.name}{path.name}-{secrets.token_hex(4)}")

    @contextmanager
    def _writing(self, path: str, size: int | None) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            with suppress(OSError):
                free = self.free_bytes()
                needed = "" if size is None else f"needed {size} bytes, "
                message = (
                    f"store {self.uri}: cannot write {path}: {error.strerror or error} ({needed}free {free} bytes)"
                )
                raise CapacityError(message) from error
            raise CapacityError(f"store {self.uri}: cannot write {path}: {error.strerror or error}") from error


_MEMORY_LOCK = threading.Lock()


class RemoteFiles:
    """An object store: create-only by the store's own precondition (If-None-Match on S3)."""

    def __init__(self, uri: str) -> None:
        import fsspec

        self.root: Path | None = None
        self.uri = uri.rstrip("/")
        protocol = urlsplit(uri).scheme
        options: dict[str, Any] = {} if protocol == "memory" else {"use_listings_cache": False}
        try:
            self._fs = fsspec.filesystem(protocol, **options)
        except ImportError as error:
            raise RequestError(f"store {uri}: {error}; pip install 'trainwright[s3]' brings s3://") from None
        self._base = self._fs._strip_protocol(self.uri).rstrip("/")
        self._is_memory = protocol == "memory"
        self._errors: tuple[type[Exception], ...] = (OSError,)
        if protocol == "s3":
            from botocore.exceptions import BotoCoreError  # type: ignore[import-untyped]

            self._errors = (OSError, BotoCoreError)

    def create(self, path: str, data: bytes, *, durable: bool = True) -> bool:
        full = self._full(path)
        for attempt in range(5):
            try:
                if self._is_memory:
                    with _MEMORY_LOCK:
                        self._fs.pipe_file(full, data, mode="create")
                else:
                    self._fs.pipe_file(full, data, mode="create")
            except self._errors as error:
                # A refusal, or the answer to a write that did arrive: what is there now decides.
                found = self._find(path)
                if found is not None:
                    return found == data and not self._is_memory
                if attempt == 4:
                    raise self._refused(path, error) from error
                time.sleep(0.1 * 2**attempt)
            else:
                return True
        raise AssertionError("unreachable")

    def put(self, chunks: Iterable[Any], place: Place) -> FileEntry:
        with tempfile.TemporaryDirectory(prefix="trainwright-") as folder:
            spool = Path(folder) / "object"
            with spool.open("wb") as file:
                for chunk in chunks:
                    file.write(chunk)
            return self.put_file(spool, place)

    def put_file(self, source: Path, place: Place) -> FileEntry:
        entry = hash_file(source)
        path = place(entry.sha256)
        if self._is_whole(path, entry):
            return entry
        try:
            self._fs.put_file(str(source), self._full(path))
        except self._errors as error:
            raise self._refused(path, error) from error
        stored = self.size(path)
        if stored != entry.bytes:
            raise CapacityError(f"store {self.uri}: {path} has {stored} bytes after writing {entry.bytes}")
        return entry

    def read(self, path: str) -> bytes:
        with self._reading(path):
            return bytes(self._fs.cat_file(self._full(path)))

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        with self._reading(path):
            return bytes(self._fs.cat_file(self._full(path), start=start, end=stop))

    def size(self, path: str) -> int | None:
        try:
            with self._reading(path):
                found = self._fs.info(self._full(path))
        except FileNotFoundError:
            return None
        return int(found["size"]) if found["type"] == "file" else None

    def fetch(self, path: str, target: Path) -> None:
        with self._reading(path):
            self._fs.get_file(self._full(path), str(target))

    def names(self, path: str) -> list[str]:
        try:
            with self._reading(path):
                found = self._fs.ls(self._full(path), detail=False, refresh=True)
        except FileNotFoundError:
            return []
        return sorted({name.rstrip("/").rsplit("/", 1)[-1] for name in found})

    def walk(self, path: str) -> Iterator[str]:
        with self._reading(path):
            found = self._fs.find(self._full(path))
        yield from sorted(name[len(self._base) + 1 :] for name in found)

    def remove(self, path: str) -> None:
        try:
            self._fs.rm_file(self._full(path))
        except FileNotFoundError:
            return
        except self._errors as error:
            raise self._refused(path, error) from error

    def settle(self, path: str) -> None:
        """Nothing to do: what an object store shows is durable."""

    def free_bytes(self) -> int | None:
        return None

    def sweep(self) -> None:
        """Nothing to do: an object store shows no unfinished upload."""

    def _full(self, path: str) -> str:
        return f"{self._base}/{path}"

    def _is_whole(self, path: str, entry: FileEntry) -> bool:
        if self.size(path) != entry.bytes:
            return False
        digest = hashlib.sha256()
        for start in range(0, entry.bytes, REMOTE_CHUNK_BYTES):
            digest.update(self.read_range(path, start, min(start + REMOTE_CHUNK_BYTES, entry.bytes)))
        return digest.hexdigest() == entry.sha256

    def _find(self, path: str) -> bytes | None:
        try:
            return self.read(path)
        except FileNotFoundError:
            return None

    def _refused(self, path: str, error: Exception) -> CapacityError:
        return CapacityError(f"store {self.uri}: cannot write {path}: {error}")

    @contextmanager
    def _reading(self, path: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except self._errors as error:
            raise CapacityError(f"store {self.uri}: cannot read {path}: {error}") from error


def check_entry(entry: FileEntry, found: FileEntry, path: str) -> None:
    """Raise StoreDamaged unless what was read is what the entry names."""
    if found != entry:
        raise StoreDamaged(
            f"{path}: {found.bytes} bytes of hash {found.sha256[:12]}, expected {entry.bytes} of {entry.sha256[:12]}"
        )
