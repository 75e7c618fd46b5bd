"""Says whom a store waits for: a file system that does not answer holds a thread where no error can be raised.

A dead NFS server or a hung FUSE daemon stops `stat`, `write` or `fsync` inside the kernel. Such calls are made under a
`Watch`; one that lasts is told of, again and again, by a thread that lives only while there is something to watch.
"""

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from recipes.errors import CapacityError

SLOW_S = 10.0
"""A call that takes longer is told of, and then whenever twice as much time has passed."""
ANSWER_S = 20.0
"""How long the first look at a store may take."""


@dataclass
class _Call:
    text: str
    tell: Callable[[str], None]
    began_at: float = field(default_factory=time.monotonic)
    told_s: float = 0.0


class _Calls:
    """The calls of this process that are under way."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Start over: a forked child has neither the thread nor the calls, and maybe a lock that nobody holds."""
        self._lock = threading.Lock()
        self._calls: dict[int, _Call] = {}
        self._is_watched = False

    def begin(self, call: _Call) -> None:
        with self._lock:
            self._calls[id(call)] = call
            if not self._is_watched:
                self._is_watched = True
                threading.Thread(target=self._look, name="store-watch", daemon=True).start()

    def end(self, call: _Call) -> None:
        with self._lock:
            self._calls.pop(id(call), None)

    def _look(self) -> None:
        while True:
            time.sleep(min(1.0, SLOW_S / 4))
            with self._lock:
                if not self._calls:
                    self._is_watched = False
                    return
                calls = list(self._calls.values())
            for call in calls:
                waited_s = time.monotonic() - call.began_at
                if waited_s >= max(SLOW_S, 2 * call.told_s):
                    call.told_s = waited_s
                    call.tell(f"{call.text} (for {waited_s:.0f} s so far)")


_CALLS = _Calls()
os.register_at_fork(after_in_child=_CALLS.forget)


class Watch:
    """One call into a file system; `tell` hears when it lasts."""

    def __init__(self, text: str, tell: Callable[[str], None]) -> None:
        self._call = _Call(text, tell)

    def __enter__(self) -> None:
        _CALLS.begin(self._call)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _CALLS.end(self._call)


def demand_answer(root: Path) -> None:
    """Raise CapacityError when the file system of a folder does not answer; whether it is there does not matter."""

    def look() -> None:
        try:
            os.stat(root)
        except OSError:
            return  # an answer, too

    thread = threading.Thread(target=look, name="store-answer", daemon=True)
    thread.start()
    thread.join(ANSWER_S)
    if thread.is_alive():
        raise CapacityError(
            f"store {root}: its file system has not answered for {ANSWER_S:.0f} s; see whether its server is up and "
            f"whether it is mounted"
        )
