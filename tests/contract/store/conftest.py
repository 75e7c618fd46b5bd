"""Empty stores in every kind of place: a folder, memory, S3 (moto)."""

import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from trainers.store.store import Store


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
