"""A store on an object store through fsspec: create-only by the store's own precondition."""

import hashlib
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from recipes.errors import CapacityError, RequestError
from trainers.store.files import Patience, Place, hash_file
from trainers.store.manifest import FileEntry

REMOTE_CHUNK_BYTES = 16 << 20
YOUNG_S = 60.0
"""An object that is there already and older than this is written again, which makes it young."""

_MEMORY_LOCK = threading.Lock()


class RemoteFiles:
    """An object store: create-only by the store's own precondition (If-None-Match on S3)."""

    def __init__(self, uri: str) -> None:
        import fsspec

        self.root: Path | None = None
        self.uri = uri.rstrip("/")
        self.patience: Patience | None = None
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

    def put(self, chunks: Iterable[Any], place: Place, size: int | None = None) -> FileEntry:
        with tempfile.TemporaryDirectory(prefix="trainwright-") as folder:
            spool = Path(folder) / "object"
            with spool.open("wb") as file:
                for chunk in chunks:
                    file.write(chunk)
            return self.put_file(spool, place)

    def put_file(self, source: Path, place: Place) -> FileEntry:
        entry = hash_file(source)
        path = place(entry.sha256)
        if self._is_whole(path, entry) and self._is_young(path):
            return entry
        try:
            self._fs.put_file(str(source), self._full(path))
        except self._errors as error:
            raise self._refused(path, error) from error
        stored = self.size(path)
        if stored != entry.bytes:
            raise CapacityError(f"store {self.uri}: {path} has {stored} bytes after writing {entry.bytes}")
        return entry

    def local(self, path: str) -> Path | None:
        return None

    def read(self, path: str) -> bytes:
        with self._reading(path):
            return bytes(self._fs.cat_file(self._full(path)))

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        try:
            with self._reading(path):
                return bytes(self._fs.cat_file(self._full(path), start=start, end=stop))
        except CapacityError:
            size = self.size(path)
            if size is None or start < size:
                raise
            return b""  # S3 refuses a range that starts at the end

    def size(self, path: str) -> int | None:
        try:
            with self._reading(path):
                found = self._fs.info(self._full(path))
        except FileNotFoundError:
            return None
        return int(found["size"]) if found["type"] == "file" else None

    def modified_at(self, path: str) -> float | None:
        try:
            with self._reading(path):
                found = self._fs.info(self._full(path))
        except FileNotFoundError:
            return None
        at = found.get("LastModified") or found.get("updated") or found.get("mtime") or found.get("created")
        return float(at.timestamp()) if hasattr(at, "timestamp") else None

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

    def remove_stale(self, path: str, modified_at: float) -> bool:
        if self.modified_at(path) != modified_at:
            return False
        self.remove(path)
        return True

    def recover(self) -> None:
        """Nothing to do: nothing is moved aside."""

    def settle(self, path: str) -> None:
        """Nothing to do: what an object store shows is durable."""

    def free_bytes(self) -> int | None:
        return None

    def sweep(self) -> None:
        """Nothing to do: an object store shows no unfinished upload."""

    def _full(self, path: str) -> str:
        return f"{self._base}/{path}"

    def _is_young(self, path: str) -> bool:
        """Tell whether an object was written so lately that no collection can have listed it."""
        at = self.modified_at(path)
        return at is not None and abs(time.time() - at) < YOUNG_S

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
