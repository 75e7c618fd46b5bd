"""Empty stores in every kind of place (a folder, memory, S3 by moto), and what the suite puts into them."""

import errno
import fcntl
import io
import logging
import os
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trainers.store import local_files
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


@pytest.fixture
def things() -> SimpleNamespace:
    """What tests put into a store, and how they damage it."""
    return SimpleNamespace(put=put, artifact=artifact, state=state, overwrite=overwrite, fingerprint=FINGERPRINT)


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


@pytest.fixture(scope="session")
def s3_process() -> Iterator[S3Server]:
    pytest.importorskip("s3fs", reason="s3fs is missing: s3:// is not tested")
    moto = pytest.importorskip("moto.moto_server.werkzeug_app", reason="moto is missing: s3:// is not tested")
    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    server = S3Server(moto.DomainDispatcherApplication(moto.create_backend_app))
    yield server
    server.stop()


@pytest.fixture
def s3_server(s3_process: S3Server) -> Iterator[S3Server]:
    yield s3_process
    s3_process.fault = lambda method, path, query: None


@pytest.fixture
def s3_uri(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """A prefix in a bucket of its own."""
    import s3fs

    for name, value in {
        "AWS_ENDPOINT_URL": s3_server.url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    bucket = f"bucket-{secrets.token_hex(8)}"
    s3fs.S3FileSystem(endpoint_url=s3_server.url).mkdir(bucket)
    return f"s3://{bucket}/prefix"


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


@pytest.fixture
def nfs_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder on what behaves like an NFS mount as far as one machine sees it."""
    monkeypatch.setattr(local_files, "os", NfsLikeSystem())
    monkeypatch.setattr(local_files, "fcntl", LocklessSystem())
    return str(tmp_path / "store")


@pytest.fixture(params=["folder", "nfs-like", "memory", "s3"])
def open_store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Store]:
    """Opens the same empty store anew at each call."""
    monkeypatch.setenv("TRAINWRIGHT_CACHE", str(tmp_path / "cache"))
    match request.param:
        case "folder":
            return lambda: Store.open(str(tmp_path / "store"))
        case "memory":
            uri = f"memory://{secrets.token_hex(8)}/store"
            return lambda: Store.open(uri)
    address = request.getfixturevalue({"nfs-like": "nfs_uri", "s3": "s3_uri"}[request.param])
    return lambda: Store.open(address)


@pytest.fixture
def store(open_store: Callable[[], Store]) -> Store:
    return open_store()
