"""A worker group of one rank in this very process: for debugging with breakpoints, and for tests."""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from cluster.environment import variables
from cluster.protocol import Json, OnBeat, Target, Verdict, WorkerFailed, WorkerSpec
from cluster.rank import describe_error, find_target
from cluster.supervise import classify, judge
from recipes.errors import Preempted


class LocalContext:
    """`WorkerContext` of the only rank."""

    rank = 0
    world_size = 1
    local_rank = 0
    node = "127.0.0.1"

    def __init__(self, stop: threading.Event, on_beat: OnBeat | None, beat_interval_s: float) -> None:
        self._stop = stop
        self._on_beat = on_beat
        self._interval_s = beat_interval_s
        self._last: tuple[str, float] = ("", 0.0)
        self._answers_stops = False

    def beat(self, phase: str, **progress: Any) -> None:
        """Hands the beat to the caller of `run`, a phase's later ones at most every beat interval.

        A stop that the target does not answer ends it here.
        """
        if self._stop.is_set() and not self._answers_stops:
            raise Preempted(f"stopped in {phase}")
        at = time.monotonic()
        if self._on_beat and (phase != self._last[0] or at - self._last[1] >= self._interval_s):
            self._last = (phase, at)
            self._on_beat(0, phase, progress)

    def stop_requested(self) -> bool:
        """Whether `stop` was called."""
        return self._stop.is_set()

    @contextmanager
    def answers_stops(self, has_unsaved: Callable[[], bool] = lambda: True) -> Iterator[None]:
        """While it is open the target answers a stop by itself; elsewhere its next beat ends it."""
        self._answers_stops = True
        try:
            yield
        finally:
            self._answers_stops = False


class LocalGroup:
    """`WorkerGroup` without processes: world size 1, no log file, no kill after the grace."""

    def __init__(self, spec: WorkerSpec) -> None:
        if spec.num_workers != 1:
            raise ValueError(f"a local group has one worker, not {spec.num_workers}")
        self.spec = spec
        self._stop = threading.Event()

    @property
    def num_placed(self) -> int:
        """This process."""
        return 1

    def prepare(self) -> None:
        """Nothing to start: this process has its imports."""

    def run(
        self, target: Target, payload: Json, on_beat: OnBeat | None = None, *, label: str = "run"
    ) -> list[Json | None]:
        """Calls the target here."""
        payload = json.loads(json.dumps(payload))
        if self._stop.is_set():
            raise Preempted("stopped before it started")
        context = LocalContext(self._stop, on_beat, self.spec.beat_interval_s)
        with variables({**self.spec.environment, **_torchrun_environment()}):
            try:
                function = find_target(target) if isinstance(target, str) else target
                return [function(payload, context)]
            except Preempted:
                raise
            except Exception as error:
                raise WorkerFailed(_verdict(error)) from error

    def stop(self, grace_s: float | None = None) -> None:
        """Makes `stop_requested()` true."""
        self._stop.set()

    def pids(self) -> dict[int, int]:
        """This process."""
        return {0: os.getpid()}

    def close(self) -> None:
        """Nothing is held."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _torchrun_environment() -> dict[str, str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ones = {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return {"RANK": "0", "LOCAL_RANK": "0", "GLOO_SOCKET_IFNAME": "lo", **ones}


def _verdict(error: Exception) -> Verdict:
    end = classify(0, LocalContext.node, time.time(), error=describe_error(error))
    return judge([end])
