"""fsspec's memory file system, answering as an object store does: a request takes effect whole, at one moment.

As it comes, a file that is written again is empty or cut off for its readers meanwhile, two who read one file move one
position, and a listing fails when a file that it names goes away.
"""

import threading
from collections.abc import Callable
from functools import wraps
from typing import Any

from fsspec.implementations.memory import MemoryFileSystem  # type: ignore[import-untyped]

_ALONE = threading.RLock()


def _alone(name: str) -> Callable[..., Any]:
    """Return a request of the memory file system, of which one is answered at a time."""
    request = getattr(MemoryFileSystem, name)

    @wraps(request)
    def answer(*args: Any, **options: Any) -> Any:
        with _ALONE:
            return request(*args, **options)

    return answer


class MemoryObjects(MemoryFileSystem):  # type: ignore[misc]
    """The files of `memory://` of this process; many threads may ask at once."""

    cat_file, get_file, info, ls, find = map(_alone, ("cat_file", "get_file", "info", "ls", "find"))
    pipe_file, put_file, rm_file = map(_alone, ("pipe_file", "put_file", "rm_file"))
