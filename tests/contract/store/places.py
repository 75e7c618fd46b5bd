"""Places of every kind for stores, and what the suite puts into them."""

import errno
import fcntl
import io
import os
import socket
import threading
from collections.abc import Callable
from typing import Any

from trainers.store.manifest import ArtifactManifest, FileEntry, Layout, StateManifest, files_digest
from trainers.store.store import Store

FINGERPRINT = "ab" * 32


def put(store: Store, data: bytes) -> FileEntry:
    return FileEntry(sha256=store.objects.put_bytes(data), bytes=len(data))


def artifact(
    store: Store, fingerprint: str = FINGERPRINT, content: bytes = b"weights", **changes: object
) -> ArtifactManifest:
    files = {"model/config.json": put(store, b"{}"), "model/model.safetensors": put(store, content)}
    fields = {
        "fingerprint": fingerprint,
        "digest": files_digest(files),
        "kind": "model",
        "stage": "base",
        "files": files,
    }
    return ArtifactManifest.model_validate({**fields, **changes})


def state(lease: int, step: int = 1, **values: int) -> StateManifest:
    return StateManifest(
        run="run", stage="base", fingerprint=FINGERPRINT, step=step, lease=lease, values=dict(values),
        layout=Layout(workers=1, micro_batch=1, accumulation=1),
    )  # fmt: skip


def overwrite(store: Store, path: str, data: bytes | None) -> None:
    """Damage a file behind the store's back."""
    files = store._files
    if files.root is not None:
        target = files.root / path
        target.chmod(0o644)
        target.unlink()
        if data is not None:
            target.write_bytes(data)
    elif data is None:
        files._fs.rm_file(files._full(path))  # type: ignore[attr-defined]
    else:
        files._fs.pipe_file(files._full(path), data)  # type: ignore[attr-defined]


class S3Server:
    """moto behind a server that answers one request at a time, as its preconditions need, and can be made to fail.

    `fault` looks at a request (method, path, query) and says what happens to it: an HTTP status instead of an answer;
    `reset`, the connection is cut before it takes effect; `lost`, after; `silent`, nothing comes back; `altered`, bytes
    of it change on the way to a server that keeps no checksums.
    """

    def __init__(self, app: Callable[..., Any]) -> None:
        from werkzeug.serving import make_server

        self._app = app
        self._lock = threading.Lock()
        self._server = make_server("127.0.0.1", 0, self, threaded=True)
        self._ending = threading.Event()
        self.fault: Callable[[str, str, str], int | str | None] = lambda method, path, query: None
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        fault = self.fault(environ["REQUEST_METHOD"], environ["PATH_INFO"], environ.get("QUERY_STRING", ""))
        if isinstance(fault, int):
            code = {409: "ConditionalRequestConflict", 500: "InternalError", 503: "SlowDown"}[fault]
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response(f"{fault} {code}", [("Content-Type", "application/xml")])
            return [f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()]
        if fault == "silent":
            self._ending.wait(60)
        if fault == "altered":
            body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            environ["wsgi.input"] = io.BytesIO(body.replace(b"weights", b"weighty"))
            for name in [
                name for name in environ if name.startswith(("HTTP_X_AMZ_CHECKSUM", "HTTP_X_AMZ_SDK_CHECKSUM"))
            ]:
                del environ[name]
            fault = None
        if fault in (None, "lost"):
            with self._lock:
                answer = list(self._app(environ, start_response if fault is None else lambda *_: None))
            if fault is None:
                return answer
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        raise ConnectionResetError("a fault of the test")

    def stop(self) -> None:
        self._ending.set()
        self._server.shutdown()
        self._server.server_close()


class NfsLikeSystem:
    """The calls of a file system on a server: answers get lost, so that what was done is done again and fails.

    Nobody but the owner may set times, here: nobody at all.
    """

    def __init__(self) -> None:
        self._count = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def _is_lost(self, call: str) -> bool:
        self._count += 1
        return self._count % 3 == 0

    def link(self, *paths: Any, **options: Any) -> None:
        os.link(*paths, **options)
        if self._is_lost("link"):
            raise FileExistsError(errno.EEXIST, "File exists")

    def unlink(self, path: Any) -> None:
        os.unlink(path)
        if self._is_lost("unlink"):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    def utime(self, *arguments: Any, **options: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")


class LocklessSystem:
    """A mount without a lock daemon."""

    def __getattr__(self, name: str) -> Any:
        return getattr(fcntl, name)

    def flock(self, *arguments: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")
