"""Empty stores in every kind of place (a folder, memory, S3 by moto), and what the suite puts into them."""

import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

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


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    pytest.importorskip("s3fs", reason="s3fs is missing: s3:// is not tested")
    server_module = pytest.importorskip("moto.server", reason="moto is missing: s3:// is not tested")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_uri(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A prefix in a bucket of its own."""
    import s3fs

    for name, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    bucket = f"bucket-{secrets.token_hex(8)}"
    s3fs.S3FileSystem(endpoint_url=s3_server).mkdir(bucket)
    return f"s3://{bucket}/prefix"


@pytest.fixture(params=["folder", "memory", "s3"])
def open_store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Store]:
    """Opens the same empty store anew at each call."""
    monkeypatch.setenv("TRAINWRIGHT_CACHE", str(tmp_path / "cache"))
    match request.param:
        case "folder":
            return lambda: Store.open(str(tmp_path / "store"))
        case "memory":
            uri = f"memory://{secrets.token_hex(8)}/store"
            return lambda: Store.open(uri)
    address = request.getfixturevalue("s3_uri")
    return lambda: Store.open(address)


@pytest.fixture
def store(open_store: Callable[[], Store]) -> Store:
    return open_store()
