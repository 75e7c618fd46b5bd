"""The workers of one run: a learner group, whose size follows the stage, and a verifier."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from cluster.protocol import Json, OnBeat, Target, WorkerGroup, WorkerSpec
from recipes.errors import StageError

GroupFactory = Callable[[WorkerSpec], WorkerGroup]
"""Makes a group: `Session.group` on Ray, `LocalGroup` in this process."""

STALL_LIMITS_S = {"*": 1800.0}
IMPORTING = ("start", "join")
UNKNOWN_ROOM = 10**5
"""Where nothing is placed on nodes."""


class WorkerPool(Protocol):
    """Who does a run's work."""

    def train(self, job: Json, num_workers: int, label: str, on_beat: OnBeat) -> Json: ...

    def verify(self, job: Json, label: str) -> Json: ...

    def room(self) -> int: ...

    def give_way(self) -> None: ...

    def release(self) -> None: ...

    def stop(self) -> None: ...

    def close(self) -> None: ...


class StageWorkers:
    """A pool of worker groups; `close` ends every process."""

    def __init__(
        self,
        make_group: GroupFactory,
        run_stage: Target,
        verify_candidate: Target,
        log_folder: Path,
        *,
        gpus_per_worker: int = 0,
        placement_timeout_s: float = 300.0,
        stall_after_s: float | None = None,
        environment: dict[str, str] | None = None,
        free_room: Callable[[], int] = lambda: UNKNOWN_ROOM,
        on_close: Callable[[], None] | None = None,
    ) -> None:
        self._make_group = make_group
        self._run_stage = run_stage
        self._verify_candidate = verify_candidate
        self._common: dict[str, Any] = {
            "log_folder": log_folder,
            "placement_timeout_s": placement_timeout_s,
            "environment": environment or {},
            "stall_limits_s": STALL_LIMITS_S,
            "stall_after_s": stall_after_s,
        }
        self._gpus_per_worker = gpus_per_worker
        self._free_room = free_room
        self._on_close = on_close
        self._learners: WorkerGroup | None = None
        self._verifier: WorkerGroup | None = None
        self._is_stopped = False

    def prepare(self, num_workers: int) -> None:
        """Start processes for the first stage; returns at once."""
        self._learner_group(num_workers).prepare()

    def train(self, job: Json, num_workers: int, label: str, on_beat: OnBeat) -> Json:
        """Run a stage on every rank; returns what rank 0 returned. Raises WorkerFailed or Preempted."""
        group = self._learner_group(num_workers)

        def on_first_work(rank: int, phase: str, progress: Json) -> None:
            # The verifier imports while the first stage works, not while its ranks still do.
            if self._verifier is None and phase not in IMPORTING:
                self._verifier_group().prepare()
            on_beat(rank, phase, progress)

        results = group.run(self._run_stage, job, on_first_work, label=label)
        if not results or results[0] is None:
            raise StageError(f"{label}: rank 0 returned nothing")
        return results[0]

    def verify(self, job: Json, label: str) -> Json:
        """Check a candidate in a process that did not make it."""
        result = self._verifier_group().run(self._verify_candidate, job, label=label)[0]
        if result is None:
            raise StageError(f"{label}: the verifier returned nothing")
        return result

    def stop(self) -> None:
        """Ask everyone to save and leave, also those who are made later."""
        self._is_stopped = True
        for group in (self._learners, self._verifier):
            if group is not None:
                group.stop()

    def room(self) -> int:
        """How many workers a stage can have: those that it has, and those for which there is room."""
        held = 0 if self._learners is None else self._learners.num_placed
        return held + self._free_room()

    def give_way(self) -> None:
        """Ask the stage's workers to save and leave, so that it can have others once they are released."""
        if self._learners is not None:
            self._learners.stop()

    def release(self) -> None:
        """End every process and give back what they held; the next stage has others started."""
        groups, self._learners, self._verifier = (self._learners, self._verifier), None, None
        for group in groups:
            if group is not None:
                group.close()

    def close(self) -> None:
        """Release all, and leave the cluster."""
        self.release()
        if self._on_close is not None:
            on_close, self._on_close = self._on_close, None
            on_close()

    def _learner_group(self, num_workers: int) -> WorkerGroup:
        if self._learners is not None and self._learners.spec.num_workers != num_workers:
            self._learners.close()
            self._learners = None
        if self._learners is None:
            spec = WorkerSpec(
                name="learner",
                num_workers=num_workers,
                gpus_per_worker=self._gpus_per_worker,
                **self._common,
            )
            self._learners = self._made(spec)
        return self._learners

    def _verifier_group(self) -> WorkerGroup:
        if self._verifier is None:
            spec = WorkerSpec(name="verifier", num_workers=1, cpus_per_worker=0, reusable=True, **self._common)
            self._verifier = self._made(spec)
        return self._verifier

    def _made(self, spec: WorkerSpec) -> WorkerGroup:
        group = self._make_group(spec)
        if self._is_stopped:
            group.stop()
        return group
