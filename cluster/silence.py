"""How long workers have been silent, pure: the driver's unanswered polls, and the usual pause between two steps."""

from collections import deque
from collections.abc import Iterable
from statistics import median

SAY_AFTER_S = 5.0
"""Without an answer for so long a worker is looked at more closely, and people are told; again after as long."""
LOST_AFTER_S = 11.0
"""Without an answer for so long a node that takes no connection is lost: Ray's defaults take 65 s."""
LONGEST_TICK_S = 2.0
"""Longer than a look at those who do not answer takes; more is time in which the driver itself was stopped."""
USUAL_STEPS = 10
LEAST_PAUSES = 5
STEPPING = "train"
"""The phase in which every beat is a step."""


class Answers:
    """Since when each worker owes an answer. Time in which the driver itself was stopped hardly counts."""

    def __init__(self, workers: Iterable[int], at: float) -> None:
        self._at = at
        self._silent_s = dict.fromkeys(workers, 0.0)

    def tick(self, at: float) -> None:
        """Let time pass."""
        passed_s = min(LONGEST_TICK_S, at - self._at)
        self._at = at
        for worker in self._silent_s:
            self._silent_s[worker] += passed_s

    def heard(self, worker: int) -> None:
        """Note that it answered."""
        self._silent_s[worker] = 0.0

    def silent_s(self, worker: int) -> float:
        """Seconds since its last answer."""
        return self._silent_s[worker]


class Pace:
    """The usual pause between two beats of a rank that trains."""

    def __init__(self) -> None:
        self._pauses: deque[float] = deque(maxlen=64)
        self._last: dict[int, tuple[str, float]] = {}

    def heard(self, rank: int, phase: str, at: float) -> None:
        """Note a beat."""
        before, since = self._last.get(rank, ("", at))
        if phase == before == STEPPING:
            self._pauses.append(at - since)
        self._last[rank] = (phase, at)

    def limit_s(self, least_s: float) -> float:
        """Longest silence of a rank that trains; unlimited until some steps are known."""
        if len(self._pauses) < LEAST_PAUSES:
            return float("inf")
        return max(least_s, USUAL_STEPS * median(self._pauses))
