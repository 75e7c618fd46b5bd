"""The driver's heartbeat: progress in the journal, and the look for stop requests."""

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from launch.records.journal import Journal, interval_s
from launch.runs.stop import StopSignal
from recipes.errors import TrainwrightError
from recipes.stages.kinds import COUNTED, SHOWN_METRICS

BEAT_KEYS = ("step", "steps", "unit", "row", "rows", *SHOWN_METRICS, *(f"{counted}_per_s" for counted in COUNTED))


@dataclass
class Latest:
    """The newest beat of rank 0, shared with the heartbeat thread."""

    stage: str | None = None
    """None between two stages."""
    phase: str | None = None
    values: dict[str, Any] = field(default_factory=dict)
    at: float = 0.0
    """Monotonic seconds of its arrival."""


class Heartbeat:
    """A thread that writes progress to the journal, ever more rarely, and looks for stop requests in the store.

    `on_tick` is called at every look.
    """

    POLL_S = 1.0
    FIRST_S = 3.0

    def __init__(
        self,
        journal: Journal,
        latest: Latest,
        stop: StopSignal,
        asked_to_stop: Callable[[], bool],
        on_tick: Callable[[], None],
    ) -> None:
        self._journal = journal
        self._latest = latest
        self._stop = stop
        self._asked_to_stop = asked_to_stop
        self._on_tick = on_tick
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join(timeout=10)

    def _beat(self) -> None:
        started = last = time.monotonic()
        while not self._done.wait(self.POLL_S):
            now = time.monotonic()
            next_s = interval_s(self.FIRST_S, now - started)
            # A store that is full or away for a moment must not end the heartbeat.
            with contextlib.suppress(TrainwrightError, OSError):
                self._on_tick()
                if not self._stop.is_set() and self._asked_to_stop():
                    self._stop.set()
                if now - last >= next_s:
                    last = now
                    latest = self._latest
                    values = {key: latest.values[key] for key in BEAT_KEYS if key in latest.values}
                    self._journal.write(
                        "progress", next_s=round(next_s, 1), stage=latest.stage, phase=latest.phase, **values
                    )
