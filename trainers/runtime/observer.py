"""What hears of a stage's progress on one rank, and tells it to stop; and long work that says how far it is."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

from trainers.runtime import distributed

B = TypeVar("B")
T = TypeVar("T")


class Observer(Protocol):
    """Hears of progress on one rank; never collective."""

    def phase(self, name: str, **progress: float) -> None:
        """Hear what happens now: train, evaluate, save, ... with step and steps_planned, rows and rows_planned."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Hear the global metrics after `step` steps; all values are finite."""

    def notify(self, text: str) -> None:
        """Hear what the person who watches the run must know; once for each text."""

    def stop_requested(self) -> bool:
        """Tell whether this rank was asked to save and leave (SIGTERM, `stop`)."""

    def answers_stops(self, has_unsaved: Callable[[], bool]) -> AbstractContextManager[None]:
        """While it is open and there is something to lose, the stage asks for `stop_requested` and saves.

        Elsewhere a stop ends the rank at once. `has_unsaved` is asked from another thread.
        """


class Interrupted(Exception):  # noqa: N818
    """Raised on every rank at the same place: a stop was asked for, and what was under way can be begun again."""


def raise_if_stopping(observer: Observer) -> None:
    """Raise Interrupted on every rank where any was asked to stop; collective."""
    if distributed.all_sum([float(observer.stop_requested())])[0] > 0:
        raise Interrupted


def counted(batches: Iterable[B], observer: Observer, phase: str, rows: int, **place: float) -> Iterator[B]:
    """Yield a rank's batches, and say how many of all ranks' `rows` are done; fillers (sample id -1) are no rows.

    `place` is said with them: step, steps_planned.
    """
    done = 0
    for batch in batches:
        observer.phase(phase, rows=min(done, rows), rows_planned=rows, **place)
        yield batch
        done += distributed.world_size() * num_rows(batch)
    observer.phase(phase, rows=rows, rows_planned=rows, **place)


def interruptible(batches: Iterable[B], observer: Observer, phase: str, rows: int) -> Iterator[B]:
    """Yield a rank's batches as `counted` does, within training: a stop raises Interrupted between two of them.

    Collective: every rank has equally many batches.
    """
    for batch in counted(batches, observer, phase, rows):
        raise_if_stopping(observer)
        yield batch


Watch = Callable[[float], None]
"""Hears what share of some work is done; raises to end the work."""


def watching(observer: Observer, phase: str, rows: int, **place: float) -> Watch:
    """Return what says how many of `rows` are done, and raises Interrupted on this rank where a stop was asked for."""

    def watch(share: float) -> None:
        observer.phase(phase, rows=int(share * rows), rows_planned=rows, **place)
        if observer.stop_requested():
            raise Interrupted

    return watch


def partly(watch: Watch, start: int, size: int, count: int) -> Watch:
    """Return what hears of rows [start, start + size) and tells of all `count`."""
    return lambda share: watch((start + share * size) / count)


def agreed(observer: Observer, work: Callable[[], T]) -> T:
    """Return what this rank's own work makes; Interrupted in it, or a stop, is raised on every rank. Collective."""
    try:
        made = [work()]
    except Interrupted:
        made = []
    raise_if_stopping(observer)
    return made[0]


def num_rows(batch: Any) -> int:
    """Return the number of a batch's rows that are no fillers."""
    return int((batch.sample_ids_B >= 0).sum())
