"""Work in threads that nothing waits for at the end of a process: one that fails leaves, whatever a disk is at."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from functools import partial
from typing import TypeVar

from trainers.store.place import Files

A = TypeVar("A")
B = TypeVar("B")


REQUESTS = 16
"""How many requests an object store is asked at once for one purpose."""


def start_beside(action: Callable[[], B]) -> "Future[B]":
    """Run an action in a daemon thread; an executor's threads would be joined when the interpreter ends."""
    outcome: Future[B] = Future()

    def run() -> None:
        try:
            outcome.set_result(action())
        except BaseException as error:  # the thread's outermost call: raised by whoever asks for the result
            outcome.set_exception(error)

    threading.Thread(target=run, name="beside", daemon=True).start()
    return outcome


def map_beside(action: Callable[[A], B], items: Iterable[A], at_once: int) -> Iterator[B]:
    """Give the results of an action in order, a few items at once; its error once none is under way."""
    running: deque[Future[B]] = deque()
    try:
        for item in items:
            if len(running) == at_once:
                yield running.popleft().result()
            running.append(start_beside(partial(action, item)))
        while running:
            yield running.popleft().result()
    except Exception:
        wait(running)
        raise


def map_requests(action: Callable[[A], B], items: Iterable[A], files: Files) -> Iterator[B]:
    """Give the results of requests in order: many at once where each is a journey, one by one in a folder."""
    return map_beside(action, items, REQUESTS) if files.root is None else map(action, items)
