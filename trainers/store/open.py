"""From a store's address to the place where its files lie."""

from pathlib import Path
from urllib.parse import urlsplit

from recipes.errors import RequestError
from trainers.store.local_files import LocalFiles
from trainers.store.place import REMOTE_PROTOCOLS, Files
from trainers.store.slow_calls import demand_answer


def open_files(uri: str) -> Files:
    """Open a folder (path or file://) or an object store (s3://, gs://, memory://); creates nothing.

    Raises CapacityError when the folder's file system does not answer.
    """
    parts = urlsplit(uri)
    if parts.scheme in ("", "file"):
        path = parts.path if parts.scheme else uri
        if not path or "\x00" in uri or (parts.scheme and parts.netloc):
            raise RequestError(f"store {uri!r} is not a folder or an address like s3://bucket/prefix")
        try:
            root = Path(path).expanduser().absolute()
        except RuntimeError:
            raise RequestError(f"store {uri!r}: there is no such user's home; write the folder out") from None
        demand_answer(root)
        return LocalFiles(root)
    if parts.scheme not in REMOTE_PROTOCOLS:
        known = ", ".join(f"{name}://" for name in REMOTE_PROTOCOLS)
        raise RequestError(f"store {uri!r}: {parts.scheme}:// is not supported; use a folder, {known}")
    from trainers.store.remote_files import RemoteFiles

    return RemoteFiles(uri)
