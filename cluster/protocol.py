"""The seams of a worker group: what is asked for, what a stage sees, and the one verdict on a failure."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

from recipes.errors import StageError

Json = dict[str, Any]
"""Plain JSON-able values only: everything that crosses a process border here is JSON."""

Target = str | Callable[[Json, "WorkerContext"], Json | None]
"""`function(payload, worker) -> result` of a module, or "module:function", which the worker alone imports."""

OnBeat = Callable[[int, str, Json], None]
"""`on_beat(rank, phase, progress)`, called in the thread of `run`, every `beat_interval_s` per rank at most."""

VerdictKind = Literal[
    "exception",  # the target raised
    "signal",  # a signal nobody here sent ended the process
    "out_of_memory",  # the kernel's or a cgroup's OOM killer ended it
    "disk_full",  # ENOSPC or EDQUOT
    "exit",  # the process left without a result
    "lost",  # the node, or Ray's worker that held the rank, went away
    "stall",  # no progress within the limit of its phase
    "preempted",  # the target stopped on request, or on SIGTERM, with saved state
    "stopped",  # killed by `stop` after its deadline
]


PRELOAD = "trainers.runtime.preload"
"""What every stage imports."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """What a group is: how many workers, what each holds, where their logs go."""

    name: str
    num_workers: int
    log_folder: Path
    """Local folder; a run writes `<label>-rank-<r>.log` there, for workers on other nodes too."""
    gpus_per_worker: int = 0
    cpus_per_worker: float = 1.0
    """0 takes nothing from the cluster: no placement group."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Set before the worker's interpreter starts."""
    preload: str | None = PRELOAD
    """Module that is imported once; the processes of its runs are forked from there."""
    reusable: bool = False
    """The same processes serve every `run` until `close`; else each process serves exactly one."""
    placement_timeout_s: float = 300.0
    stop_grace_s: float = 30.0
    """From `stop` to the kill."""
    stall_limits_s: Mapping[str, float] = field(default_factory=dict)
    """Longest silence per phase; `"*"` is every other phase; without it silence is unlimited."""
    stall_after_s: float | None = None
    """Least silence that counts as a stall: of ranks that train, if it is also 10 of their usual steps; of a rank whose
    process is stopped, and of a worker that does not answer. None: silence is limited by `stall_limits_s` alone."""
    beat_interval_s: float = 0.25


class WorkerContext(Protocol):
    """What a target sees of the place it runs in."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def local_rank(self) -> int: ...
    @property
    def node(self) -> str:
        """The node's address, for messages; no artifact may hold it."""
        ...

    def beat(self, phase: str, **progress: Any) -> None:
        """Says where this rank is; cheap enough for every micro-batch (JSON-able values; the latest one wins)."""
        ...

    def stop_requested(self) -> bool:
        """True once the driver asked to stop or this process got SIGTERM: save, then raise `Preempted`."""
        ...

    def answers_stops(self, has_unsaved: Callable[[], bool] = ...) -> AbstractContextManager[None]:
        """While it is open the target answers a stop by itself where it has something to lose; else it ends the rank.

        `has_unsaved` is asked from another thread when the stop comes; without it there always is.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Why a run of a group failed: one cause, on one rank; what followed from it is folded."""

    kind: VerdictKind
    message: str
    """One line that names cause, rank and node."""
    rank: int | None = None
    node: str | None = None
    infrastructure: bool = False
    """True: another attempt may succeed. False: it would fail in the same way."""
    error: str | None = None
    """Class name of the exception that the target raised."""
    exit_code: int = StageError.exit_code
    """The one that the raised TrainwrightError carries; 4 for everything else."""
    traceback: str = ""
    tail: tuple[str, ...] = ()
    """Last lines that the rank printed."""
    stacks: Mapping[int, str] = field(default_factory=dict)
    """Python stacks by rank, of a stall."""
    folded: tuple[str, ...] = ()
    """One line per other rank that failed."""

    def to_json(self) -> Json:
        """The verdict as a plain JSON object."""
        return {**asdict(self), "stacks": {str(rank): text for rank, text in self.stacks.items()}}


class WorkerFailed(StageError):  # noqa: N818
    """A run of a worker group failed; `verdict` says why. Its exit code is the verdict's."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict)
        self.verdict = verdict
        self.exit_code = verdict.exit_code  # type: ignore[misc]

    def __str__(self) -> str:
        return self.verdict.message


class WorkerGroup(Protocol):
    """Workers of one role. Made by `Session.group` (on Ray) or `LocalGroup` (this process)."""

    @property
    def spec(self) -> WorkerSpec: ...

    @property
    def num_placed(self) -> int:
        """How many workers hold resources at present."""
        ...

    def prepare(self) -> None:
        """Starts the import of `spec.preload`, which every `run` shares; returns at once."""
        ...

    def run(
        self, target: Target, payload: Json, on_beat: OnBeat | None = None, *, label: str = "run"
    ) -> list[Json | None]:
        """Runs the target on every rank and returns the results by rank.

        `label` names the logs. Raises `WorkerFailed`, or `recipes.errors.Preempted` when the ranks stopped on request;
        either way no process of this run is left.
        """
        ...

    def stop(self, grace_s: float | None = None) -> None:
        """From any thread or signal handler: makes `stop_requested()` true on every rank, kills after the grace.

        A rank that does not answer stops (`answers_stops`) ends at once. It holds for the rest of the group's life: a
        later `run` raises `Preempted` at once.
        """
        ...

    def pids(self) -> dict[int, int]:
        """Process id per rank of the run in progress, on the rank's own node."""
        ...

    def close(self) -> None:
        """Ends every process of the group and gives its resources back; idempotent."""
        ...

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
