"""A store on an object store through fsspec: create-only by the store's own precondition."""

import errno
import hashlib
import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from recipes.errors import CapacityError, RequestError
from trainers.store.manifest import FileEntry
from trainers.store.place import Patience, Place, hash_file, writing
from trainers.store.s3_requests import list_keys, look_at
from trainers.store.slow_calls import Watch

log = logging.getLogger("trainwright.store")

REMOTE_CHUNK_BYTES = 16 << 20
CONNECTIONS = 32
"""Requests that may be under way at once."""
CONNECT_S, READ_S = 5.0, 15.0
"""How long one request may take to connect, and to bring the next bytes."""
ANSWER_S = 20.0
"""How long requests are tried again without an answer where nobody has given the store patience."""
TELL_S = 3.0
FIRST_PAUSE_S, LAST_PAUSE_S = 0.1, 5.0
TRANSFERS = ("upload", "fetch")
"""Requests of any size: they may last, as long as bytes come and go."""
UNFINISHED_S = 24 * 3600.0
"""An upload in parts that was begun longer ago than that has nobody who continues it."""
PASSING = (errno.EBUSY, errno.EIO, errno.EREMOTEIO, errno.ETIMEDOUT, None)
"""Errors of requests that may go well at the next try: 409, 5xx, throttling, lost connections."""
YOUNG_S = 60.0
"""An object that is there already and older than this is written again, which makes it young."""

T = TypeVar("T")


@cache
def _s3_session() -> Any:
    """Return the session of all clients. Without `Expect: 100-continue`: no limit ends the wait for the "continue"."""
    try:
        from aiobotocore.session import AioSession  # type: ignore[import-not-found,import-untyped,unused-ignore]
        from botocore.handlers import add_expect_header  # type: ignore[import-untyped]
    except ImportError:
        return None  # s3fs is missing, too, which is told where it is asked for
    session = AioSession()
    session.unregister("before-call.s3", add_expect_header)
    return session


class RemoteFiles:
    """An object store: create-only by the store's own precondition (If-None-Match on S3)."""

    def __init__(self, uri: str) -> None:
        import fsspec

        from trainers.store.memory import MemoryObjects

        self.root: Path | None = None
        self.uri = uri.rstrip("/")
        self.patience: Patience | None = None
        protocol = urlsplit(uri).scheme
        self._is_memory, self._is_s3 = protocol == "memory", protocol == "s3"
        options: dict[str, Any] = {"use_listings_cache": False}
        if self._is_s3:
            times = {"connect_timeout": CONNECT_S, "read_timeout": READ_S, "retries": {"total_max_attempts": 1}}
            options |= {"config_kwargs": {**times, "max_pool_connections": CONNECTIONS}, "session": _s3_session()}
        try:
            self._fs = MemoryObjects() if self._is_memory else fsspec.filesystem(protocol, **options)
        except ImportError as error:
            raise RequestError(f"store {uri}: {error}; pip install 'trainwright[s3]' brings s3://") from None
        self._base = self._fs._strip_protocol(self.uri).rstrip("/")
        self._errors: tuple[type[Exception], ...] = (OSError,)
        self._silences: tuple[type[Exception], ...] = (TimeoutError, ConnectionError)
        if self._is_s3:
            from botocore import exceptions  # type: ignore[import-untyped]

            self._errors = (OSError, exceptions.BotoCoreError)
            self._silences += (exceptions.ConnectionError, exceptions.HTTPClientError, exceptions.IncompleteReadError)
            self._fs.retries = 2

    def create(self, path: str, data: bytes, *, durable: bool = True) -> bool:
        full = self._full(path)

        def write() -> bool:
            try:
                self._fs.pipe_file(full, data, mode="create")
            except self._errors:
                # A refusal, or the answer to a write that did arrive: what is there now decides.
                try:
                    return self._cat(full) == data and not self._is_memory
                except FileNotFoundError:
                    pass
                raise
            return True

        return self._ask("write", path, write)

    def put(self, chunks: Iterable[Any], place: Place, size: int | None = None) -> FileEntry:
        with ExitStack() as stack:
            with writing(Path(tempfile.gettempdir())):
                spool = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="trainwright-"))) / "object"
                with spool.open("wb") as file:
                    for chunk in chunks:
                        file.write(chunk)
            return self.put_file(spool, place)

    def put_file(self, source: Path, place: Place) -> FileEntry:
        """Upload without a condition: whoever else writes this name writes these bytes, an altered object is replaced,
        and a whole one becomes young. Below 100 MB it is one request with the bytes as its body; the hash is that of
        what the store gives back, which says more than a checksum that it was sent."""
        entry = hash_file(source)
        path = place(entry.sha256)
        if self._is_young(path) and self._is_whole(path, entry):
            return entry

        def upload() -> None:
            try:
                self._fs.put_file(str(source), self._full(path))
            except FileNotFoundError:
                # The answer that completed an upload in parts may be lost; asked again, the store knows none such.
                if not self._is_whole(path, entry):
                    raise

        self._ask("upload", path, upload)
        if not self._is_whole(path, entry):
            stored = self.size(path)
            raise CapacityError(
                f"store {self.uri}: {path} is altered after writing {entry.bytes} bytes; it has {stored}"
            )
        return entry

    def local(self, path: str) -> Path | None:
        return None

    def read(self, path: str) -> bytes:
        return self._ask("read", path, lambda: self._cat(self._full(path)))

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        try:
            return self._ask("read", path, lambda: bytes(self._fs.cat_file(self._full(path), start=start, end=stop)))
        except CapacityError:
            size = self.size(path)
            if size is None or start < size:
                raise
            return b""  # S3 refuses a range that starts at the end

    def size(self, path: str) -> int | None:
        found = self._info(path)
        if self._is_s3:
            return None if found is None else int(found["ContentLength"])
        return int(found["size"]) if found is not None and found["type"] == "file" else None

    def modified_at(self, path: str) -> float | None:
        found = self._info(path) or {}
        at = found.get("LastModified") or found.get("updated") or found.get("mtime") or found.get("created")
        return float(at.timestamp()) if isinstance(at, datetime) else None

    def fetch(self, path: str, target: Path) -> None:
        self._ask("fetch", path, lambda: self._fs.get_file(self._full(path), str(target)))

    def names(self, path: str) -> list[str]:
        def ask() -> list[str]:
            if self._is_s3:
                return [name for name, _ in list_keys(self._fs, self._full(path), deep=False)]
            return list(self._fs.ls(self._full(path), detail=False, refresh=True))

        try:
            found = self._ask("list", path, ask)
        except FileNotFoundError:
            return []
        return sorted({name.rstrip("/").rsplit("/", 1)[-1] for name in found})

    def walk(self, path: str) -> Iterator[str]:
        yield from sorted(self.sizes(path))

    def sizes(self, path: str) -> dict[str, int]:
        def ask() -> list[tuple[str, int | None]]:
            if self._is_s3:
                return list_keys(self._fs, self._full(path), deep=True)
            return [(name, info["size"]) for name, info in self._fs.find(self._full(path), detail=True).items()]

        try:
            found = self._ask("list", path, ask)
        except FileNotFoundError:
            return {}
        return {name[len(self._base) + 1 :]: int(size or 0) for name, size in found}

    def remove(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self._ask("remove", path, lambda: self._fs.rm_file(self._full(path)))

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
        """Abort uploads in parts that were begun long ago: nobody sees them, and they are paid for."""
        if not self._is_s3:
            return
        bucket, _, prefix = self._base.partition("/")
        try:
            answer = self._ask(
                "list", "unfinished uploads", lambda: self._fs.call_s3("list_multipart_uploads", Bucket=bucket)
            )
            for upload in answer.get("Uploads", ()):
                is_ours = upload["Key"].startswith(f"{prefix}/" if prefix else "objects/")
                if is_ours and time.time() - upload["Initiated"].timestamp() > UNFINISHED_S:
                    self._fs.abort_mpu(bucket, upload["Key"], upload["UploadId"])
        except (FileNotFoundError, CapacityError) as error:
            log.warning("store %s: unfinished uploads were not looked for: %s", self.uri, error)

    def _cat(self, full: str) -> bytes:
        # s3fs asks for the size first where it may read parts at once.
        return bytes(self._fs.cat_file(full, **({"max_concurrency": 1} if self._is_s3 else {})))

    def _info(self, path: str) -> dict[str, Any] | None:
        def ask() -> dict[str, Any]:
            full = self._full(path)
            found: dict[str, Any] = look_at(self._fs, full) if self._is_s3 else self._fs.info(full)
            return found

        try:
            return self._ask("read", path, ask)
        except FileNotFoundError:
            return None

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

    def _ask(self, verb: str, path: str, request: Callable[[], T]) -> T:
        """Make a request that may be made twice; one that is not answered or put off is tried again, and told of.

        Raises FileNotFoundError, and CapacityError once the store has kept silent for as long as there is patience.
        """
        began_at, pause_s, is_told = time.monotonic(), FIRST_PAUSE_S, False
        limit_s = ANSWER_S if self.patience is None else max(ANSWER_S, self.patience.limit_s)
        tell = log.warning if self.patience is None else self.patience.tell
        while True:
            watch: AbstractContextManager[None] = nullcontext()
            if verb not in TRANSFERS:
                watch = Watch(f"store {self.uri}: waiting to {verb} {path}", tell)
            try:
                with watch:
                    found = request()
            except FileNotFoundError as error:  # an answer: the file is not there, or to a write, the bucket
                if verb in ("write", "upload"):
                    raise CapacityError(f"store {self.uri}: cannot {verb} {path}: {error}") from error
                if is_told:
                    tell(f"store {self.uri}: answers again after {time.monotonic() - began_at:.0f} s")
                raise
            except self._errors as error:
                waited_s = time.monotonic() - began_at
                text = f"store {self.uri}: cannot {verb} {path}: {error}"
                if not self._passes(error):
                    raise CapacityError(text) from error
                if waited_s >= limit_s:
                    raise CapacityError(f"{text} (no answer for {waited_s:.0f} s)") from error
                if waited_s >= TELL_S and not is_told:
                    is_told = True
                    tell(f"{text}; waiting for an answer, at most {limit_s:.0f} s")
                time.sleep(min(pause_s, limit_s - waited_s))
                pause_s = min(2 * pause_s, LAST_PAUSE_S)
            else:
                if is_told:
                    tell(f"store {self.uri}: answers again after {time.monotonic() - began_at:.0f} s")
                return found

    def _passes(self, error: Exception) -> bool:
        """Tell whether an error may be over at the next try."""
        if self._is_memory or isinstance(error, PermissionError | FileExistsError):
            return False
        return isinstance(error, self._silences) or (isinstance(error, OSError) and error.errno in PASSING)
