"""A store in a POSIX folder: temporary file, fsync, hard link under the final name, fsync of the folder."""

import fcntl
import logging
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from recipes.errors import CapacityError, StoreDamaged
from trainers.store.background_threads import start_beside
from trainers.store.manifest import FileEntry
from trainers.store.place import (
    CHUNK_BYTES,
    FULL,
    Hashing,
    Patience,
    Place,
    StoreFull,
    file_chunks,
    hash_buffers,
    hash_file,
    reading,
    why,
)
from trainers.store.slow_calls import Watch
from trainers.store.trust import StoreUntrusted, check_path

log = logging.getLogger("trainwright.store")

STALE_SECONDS = 60.0
"""A temporary file older than this that nobody holds locked was left by a dead writer."""
TRASH = "trash"
FOLDER_MODE = 0o775
"""Folders of a store are never writable for everybody, whatever the umask."""

T = TypeVar("T")


class _FileChunks:
    """A local file's bytes, as often as they are asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __iter__(self) -> Iterator[bytes]:
        with reading(str(self._path)):
            yield from file_chunks(self._path)


class LocalFiles:
    """A folder on a POSIX file system with hard links: local disk, tmpfs, NFS.

    Every path is looked at before it is used: StoreUntrusted for what others may have written and for links (trust.py).
    """

    def __init__(self, root: Path) -> None:
        self.root: Path = root
        self.uri = str(root)
        self.patience: Patience | None = None
        self._durable_folders: set[str] = set()

    def create(self, path: str, data: bytes, *, durable: bool = True) -> bool:
        if self._stat(path) is not None:
            return False
        final = self.root / path

        def write() -> bool:
            temporary, _ = self._write_temporary([data], durable)
            try:
                return self._link(temporary, final, durable)
            finally:
                _unlink(temporary)

        return self._writing(path, len(data), write)

    def put(self, chunks: Iterable[Any], place: Place, size: int | None = None) -> FileEntry:
        def write() -> FileEntry:
            temporary, entry = self._write_temporary(chunks, True)
            try:
                path = place(entry.sha256)
                final = self.root / path
                check_path(self.root, os.path.dirname(path))
                while not self._link(temporary, final, True):
                    if self._is_whole(path, entry):
                        if self._renew(temporary, final):
                            self._sync_folder(final.parent)
                            break
                    else:
                        self._quarantine(final)
            finally:
                _unlink(temporary)
            return entry

        return self._writing("an object", size, write, once=isinstance(chunks, Iterator))

    def put_file(self, source: Path, place: Place) -> FileEntry:
        with reading(str(source)):
            size = source.stat().st_size
        return self.put(_FileChunks(source), place, size)

    def local(self, path: str) -> Path:
        with self._reading("look at", path):
            check_path(self.root, path)
        return self.root / path

    def read(self, path: str) -> bytes:
        place = self.local(path)
        with self._reading("read", path):
            return place.read_bytes()

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        place = self.local(path)
        with self._reading("read", path), place.open("rb") as file:
            file.seek(start)
            return file.read(stop - start)

    def size(self, path: str) -> int | None:
        found = self._stat(path)
        return None if found is None else found.st_size

    def modified_at(self, path: str) -> float | None:
        found = self._stat(path)
        return None if found is None else found.st_mtime

    def fetch(self, path: str, target: Path) -> None:
        place = self.local(path)
        with self._reading("read", path):
            shutil.copyfile(place, target)

    def names(self, path: str) -> list[str]:
        try:
            place = self.local(path)
            with self._reading("list", path):
                return sorted(os.listdir(place))
        except FileNotFoundError:
            return []
        except NotADirectoryError:
            first = path.partition("/")[0]
            if (self.root / first).is_file():
                raise StoreDamaged(f"store {self.uri}: {first} is not a folder") from None
            return []  # a stray file among folders

    def walk(self, path: str) -> Iterator[str]:
        for name in self.names(path):
            child = f"{path}/{name}"
            place = self.local(child)
            with self._reading("look at", child):
                is_folder = place.is_dir()
            if is_folder:
                yield from self.walk(child)
            else:
                yield child

    def sizes(self, path: str) -> dict[str, int]:
        found = {child: self.size(child) for child in self.walk(path)}
        return {child: size for child, size in found.items() if size is not None}

    def remove(self, path: str) -> None:
        final = self.local(path)

        def unlink() -> None:
            _unlink(final)
            with suppress(FileNotFoundError):
                self._sync_folder((self.root / path).parent)

        self._writing(path, 0, unlink)

    def remove_stale(self, path: str, modified_at: float) -> bool:
        """Move the file aside first: a writer that renews it in this moment is seen afterwards, and it goes back."""
        final, aside = self.local(path), self.local(f"{TRASH}/{path}")

        def move() -> bool:
            if self.modified_at(path) != modified_at:
                return False
            self._make_folder(aside.parent, durable=False)
            try:
                os.rename(final, aside)
            except FileNotFoundError:
                return False
            if os.stat(aside).st_mtime != modified_at:
                self._restore(aside, final)
                return False
            _unlink(aside)
            return True

        return self._writing(path, 0, move)

    def recover(self) -> None:
        def restore() -> None:
            for path in list(self.walk(TRASH)):
                self._restore(self.root / path, self.root / path.removeprefix(f"{TRASH}/"))

        self._writing(TRASH, 0, restore)

    def settle(self, path: str) -> None:
        self._writing(path, 0, lambda: self._sync_folder((self.root / path).parent))

    def free_bytes(self) -> int | None:
        found = self._file_system()
        return found.f_bavail * found.f_frsize

    def _file_system(self) -> os.statvfs_result:
        with self._reading("look at", "its folder"):
            place = self.root
            while not place.exists():
                place = place.parent
            return os.statvfs(place)

    def sweep(self) -> None:
        for name in self.names("tmp"):
            with suppress(OSError, CapacityError, StoreDamaged):
                path = self.local(f"tmp/{name}")
                if time.time() - path.stat().st_mtime < STALE_SECONDS:
                    continue
                descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(path)
                finally:
                    os.close(descriptor)

    def _stat(self, path: str) -> os.stat_result | None:
        try:
            place = self.local(path)
            with self._reading("look at", path):
                found = os.stat(place)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found if stat.S_ISREG(found.st_mode) else None

    def _write_temporary(self, chunks: Iterable[Any], durable: bool) -> tuple[Path, FileEntry]:
        folder = self.root / "tmp"
        self._make_folder(folder, durable=False)
        temporary = folder / secrets.token_hex(12)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with suppress(OSError):  # without locks nothing is swept
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            entry = self._write_and_hash(descriptor, chunks, durable)
        except BaseException:
            _unlink(temporary)
            raise
        finally:
            os.close(descriptor)
        return temporary, entry

    def _write_and_hash(self, descriptor: int, chunks: Iterable[Any], durable: bool) -> FileEntry:
        """Write buffers to a file and return their hash; those in memory are hashed while the disk takes them."""
        passing = Hashing(chunks)
        if not isinstance(chunks, Sequence) or sum(memoryview(chunk).nbytes for chunk in chunks) < CHUNK_BYTES:
            self._write(descriptor, passing, durable)
            return passing.entry
        hashed = start_beside(lambda: hash_buffers(chunks))
        self._write(descriptor, chunks, durable)
        return hashed.result()

    def _write(self, descriptor: int, chunks: Iterable[Any], durable: bool) -> None:
        size = 0
        for chunk in chunks:
            view = memoryview(chunk).cast("B")
            size += len(view)
            while view:
                with self._watch("write in tmp"):
                    view = view[os.write(descriptor, view) :]
        os.fchmod(descriptor, 0o444)
        if os.fstat(descriptor).st_size != size:
            raise OSError("short write")
        if durable:
            with self._watch("fsync in tmp"):
                os.fsync(descriptor)

    def _link(self, temporary: Path, final: Path, durable: bool) -> bool:
        """Link a file under its final name; False when the name was taken."""
        self._make_folder(final.parent, durable)
        try:
            is_ours = self._takes_name(temporary, final)
        except FileNotFoundError:  # the folder was removed since this process made it
            self._durable_folders.clear()
            self._make_folder(final.parent, durable)
            is_ours = self._takes_name(temporary, final)
        if is_ours and durable:
            self._sync_folder(final.parent)
        return is_ours

    def _takes_name(self, temporary: Path, final: Path) -> bool:
        try:
            os.link(temporary, final)
        except FileExistsError:
            # NFS: a request whose answer got lost is made again, and finds what the first one has made.
            try:
                return os.path.samestat(os.stat(temporary), os.lstat(final))
            except FileNotFoundError:
                return False
        return True

    def _renew(self, temporary: Path, final: Path) -> bool:
        """Make a whole object young again, so that a collection that has listed it spares it; False: it went."""
        try:
            os.utime(final)
        except FileNotFoundError:
            return False
        except PermissionError:  # another user's: the same bytes take its place
            os.replace(temporary, final)
        return True

    def _restore(self, aside: Path, final: Path) -> None:
        self._make_folder(final.parent, durable=False)
        with suppress(FileExistsError):
            os.link(aside, final, follow_symlinks=False)
        self._sync_folder(final.parent)
        _unlink(aside)

    def _make_folder(self, folder: Path, durable: bool) -> None:
        """Make a folder; a durable one is known to its parent on disk, whoever made it."""
        if str(folder) in self._durable_folders:
            return
        if folder != self.root:
            self._make_folder(folder.parent, durable)
            check_path(self.root, folder.relative_to(self.root).as_posix())
        folder.mkdir(FOLDER_MODE, parents=True, exist_ok=True)
        if durable:
            self._sync_folder(folder.parent)
            self._durable_folders.add(str(folder))

    def _sync_folder(self, folder: Path) -> None:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with self._watch(f"fsync of {folder.relative_to(self.root.parent)}"):
                os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _watch(self, what: str) -> Watch:
        """Watch a call; one that lasts is told to whoever hears of a full store."""
        tell = log.warning if self.patience is None else self.patience.tell
        return Watch(f"store {self.uri}: waiting for the file system to {what}", tell)

    @contextmanager
    def _reading(self, verb: str, path: str) -> Iterator[None]:
        with reading(f"store {self.uri}: {path}"), self._watch(f"{verb} {path}"):
            yield

    def _is_whole(self, path: str, entry: FileEntry) -> bool:
        """Tell whether an object is there and right; one that others may have written is not."""
        try:
            found = self.local(path)
            with reading(path):
                return found.stat().st_size == entry.bytes and hash_file(found) == entry
        except (FileNotFoundError, StoreUntrusted, StoreDamaged):
            return False

    def _quarantine(self, path: Path) -> None:
        folder = self.root / "quarantine"
        self._make_folder(folder, durable=True)
        with suppress(FileNotFoundError):
            os.rename(path, folder / f"{path.parent.name}{path.name}-{secrets.token_hex(4)}")

    def _writing(self, path: str, size: int | None, action: Callable[[], T], once: bool = False) -> T:
        """Run an action on the disk; one that finds no room is repeated for as long as the store has patience."""
        waited_s = 0.0
        while True:
            try:
                result = action()
            except OSError as error:
                refusal = self._refusal(path, size, error)
                if once or self.patience is None or error.errno not in FULL:
                    raise refusal from error
                waited_s = self.patience.wait(refusal, waited_s)
            else:
                if waited_s and self.patience is not None:
                    self.patience.tell(f"store {self.uri}: there is room again after {waited_s:.0f} s")
                return result

    def _refusal(self, path: str, size: int | None, error: OSError) -> CapacityError:
        text = f"store {self.uri}: cannot write {path}: "
        if error.errno not in FULL:
            return CapacityError(text + why(error))
        text += str(error.strerror)
        details = [] if size is None else [f"needed {size} bytes"]
        with suppress(CapacityError, StoreDamaged):
            details.append(f"free {self.free_bytes()} bytes")
            if self._file_system().f_favail == 0 < self._file_system().f_files:
                details.append("free 0 inodes, see df -i")
        return StoreFull(f"{text} ({', '.join(details)})")


def _unlink(path: Path) -> None:
    """Remove a file; one that is gone is no error (NFS: a request whose answer got lost is made again)."""
    with suppress(FileNotFoundError):
        os.unlink(path)
