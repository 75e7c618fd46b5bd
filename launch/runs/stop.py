"""How a run is asked to stop: by a signal, or by a request in the store."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


class StopSignal:
    """Set once by SIGTERM, SIGHUP or a stop request in the store; tells the pool at once."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._listeners: list[Callable[[], None]] = []

    def listen(self, listener: Callable[[], None]) -> None:
        """Call `listener` when the stop comes, or now if it came already."""
        self._listeners.append(listener)
        if self._event.is_set():
            listener()

    def set(self) -> None:
        """Ask for the stop; idempotent."""
        if not self._event.is_set():
            self._event.set()
            for listener in self._listeners:
                listener()

    def is_set(self) -> bool:
        """Whether the stop was asked for."""
        return self._event.is_set()

    def wait(self, seconds: float) -> bool:
        """Sleep, at most until the stop comes; True if it came."""
        return self._event.wait(seconds)


@contextlib.contextmanager
def stop_on_signals(stop: StopSignal) -> Iterator[Callable[[], None]]:
    """SIGTERM and SIGHUP set the stop while the block runs (in the main thread; elsewhere nothing changes).

    Gives a function that installs the handlers again: Ray's native code puts its own in their place.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        # A handler may interrupt code that holds a lock of the pool, so the listeners run in a thread of their own.
        threading.Thread(target=stop.set, daemon=True).start()

    def install() -> None:
        for number in before:
            signal.signal(number, on_signal)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    install()
    try:
        yield install
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
