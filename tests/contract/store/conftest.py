"""Empty stores in every kind of place (a folder, memory, S3 by moto), and what the suite puts into them."""

import logging
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.contract.store.places import (
    LocklessSystem,
    NfsLikeSystem,
    S3Server,
)
from trainers.store import local_files
from trainers.store.store import Store


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
