"""One run of a worker group on Ray: follows the beats, notices the first end, sees the rest out, gathers the logs."""

import contextlib
import errno
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.protocol import Json, OnBeat, Verdict, VerdictKind, WorkerFailed, WorkerSpec
from cluster.silence import LOST_AFTER_S, SAY_AFTER_S, Answers, Pace
from cluster.supervise import UNLIMITED_S, Pulse, RankEnd, find_stall, judge, odd_rank
from cluster.worker import take_folder

if TYPE_CHECKING:
    from cluster.session import Session

CALL_TIMEOUT_S = 10.0
STACKS_TIMEOUT_S = 4.0
# How long the others get to say how they ended; a broken connection waits longer, for its cause.
GRACE_S = 1.0
CONSEQUENCE_GRACE_S = 5.0


@dataclass(slots=True)
class StopWish:
    """Whether, since when and with how much patience somebody asked a group to stop; set from any thread."""

    grace_s: float
    asked_at: float | None = None


@dataclass(slots=True)
class Rank:
    """One worker, where it is, and how the run in progress stands on it."""

    actor: Any
    bundle: int
    node_id: str
    node: str
    info: Json
    number: int = 0
    local_rank: int = 0
    pulse: Json = field(default_factory=dict)
    log: Path = Path()
    log_start: int = 0
    log_offset: int = 0
    is_cut_off: bool = False
    """Whether its node takes no connection any more."""

    @property
    def ships_log(self) -> bool:
        """Whether its log is written where the driver cannot see it."""
        return bool(self.info["log_folder"])

    @property
    def written_log(self) -> str:
        """Path of the log on the rank's own node."""
        folder = self.info["log_folder"]
        return str(Path(folder) / self.log.name) if folder else str(self.log.resolve())


class Run:
    """One run in progress: follows the beats, notices the first end, sees the rest out."""

    def __init__(
        self,
        session: "Session",
        spec: WorkerSpec,
        run_id: str,
        calls: dict[Any, Rank],
        on_beat: OnBeat | None,
        stop: StopWish,
        on_wait: Callable[[str], None],
    ) -> None:
        self.lost: list[Rank] = []
        """Ranks whose worker, not only its process, is gone."""
        self._session = session
        self._spec = spec
        self._run_id = run_id
        self._calls = calls
        self._ranks = list(calls.values())
        self._on_beat = on_beat
        self._stop = stop
        self._on_wait = on_wait
        self._answers = Answers((rank.number for rank in self._ranks), time.monotonic())
        self._pace = Pace()
        self._look_at = self._say_at = SAY_AFTER_S
        """Seconds of silence at which the silent are looked at next, and at which people are told next."""
        self._polls: dict[Any, Rank] = {}
        self._poll_at = dict.fromkeys((rank.number for rank in self._ranks), 0.0)
        self._ends: dict[int, RankEnd] = {}
        self._abort_at: float | None = None
        self._stacks: dict[int, str] = {}
        self._stalled: RankEnd | None = None

    def follow(self) -> list[RankEnd]:
        """Until every rank has ended."""
        while self._calls:
            trouble = self._session.trouble()
            if trouble:
                self._calls.clear()
                message = f"{trouble}; resume continues the run"
                raise WorkerFailed(Verdict(kind="lost", message=message, infrastructure=False))
            self._poll()
            waiting = [*self._calls, *self._polls]
            ray.wait(waiting, num_returns=1, timeout=self._spec.beat_interval_s / 2, fetch_local=False)
            ready, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0, fetch_local=False)
            for call in ready:
                if call in self._calls:
                    self._take_end(call, self._calls.pop(call))
                else:
                    self._take_pulse(call, self._polls.pop(call))
            self._answers.tick(time.monotonic())
            self._check_stop()
            self._check_answers()
            self._check_stall()
            self._check_abort()
        self._fetch_logs()
        return [self._ends[rank.number] for rank in self._ranks]

    def verdict(self, ends: Sequence[RankEnd]) -> Verdict:
        """Why it failed."""
        found = judge([*ends, self._stalled] if self._stalled else list(ends))
        return replace(found, stacks=dict(self._stacks))

    def abort(self) -> None:
        """Kills what still runs; waits until it is gone."""
        for rank in self._calls.values():
            rank.actor.abort.remote()
        self._wait_for_rest()

    def _poll(self) -> None:
        at = time.monotonic()
        busy = {rank.number for rank in self._polls.values()}
        for rank in self._calls.values():
            if rank.number not in busy and at >= self._poll_at[rank.number]:
                self._poll_at[rank.number] = at + self._spec.beat_interval_s
                is_stopping = self._stop.asked_at is not None
                pulse = rank.actor.pulse.remote(self._run_id, rank.log_offset, rank.ships_log, is_stopping)
                self._polls[pulse] = rank

    def _take_pulse(self, call: Any, rank: Rank) -> None:
        try:
            pulse: Json = ray.get(call)
        except RayError:
            return  # the call of the run says what happened
        self._answers.heard(rank.number)
        if not pulse:
            return
        self._append_log(rank, pulse.pop("log", b""))
        is_started = pulse["pid"] != rank.pulse.get("pid", 0)
        is_new = pulse["number"] != rank.pulse.get("number")
        rank.pulse = pulse
        if is_started:
            self._session.watch([pulse["pid"]])
        if is_new and rank.number not in self._ends:
            self._pace.heard(rank.number, pulse["phase"], time.monotonic())
            self._tell(rank, pulse["phase"], pulse["progress"])

    def _tell(self, rank: Rank, phase: str, progress: Json) -> None:
        if phase not in ("", "start") and self._on_beat:
            self._on_beat(rank.number, phase, progress)

    def _take_end(self, call: Any, rank: Rank) -> None:
        try:
            end: RankEnd = ray.get(call)
        except RayError as error:
            end = self._lost(rank, error)
            self.lost.append(rank)
        was_aborted = self._abort_at is not None and time.monotonic() >= self._abort_at
        if was_aborted and end.kind in ("signal", "out_of_memory"):
            end = replace(end, kind="stopped", message=f"ended with the group: rank {rank.number} on node {rank.node}")
        self._ends[rank.number] = end
        if (end.phase, end.progress) != (rank.pulse.get("phase"), rank.pulse.get("progress")):
            self._tell(rank, end.phase, end.progress)
        if end.kind != "result" and self._abort_at is None:
            grace = CONSEQUENCE_GRACE_S if end.is_consequence else GRACE_S
            if end.kind == "preempted":
                grace = self._stop.grace_s
            self._abort_at = time.monotonic() + grace

    def _lost(self, rank: Rank, error: RayError) -> RankEnd:
        alive = {node.id for node in self._session.nodes()}
        where = f"rank {rank.number} on node {rank.node}"
        phase = rank.pulse.get("phase") or "start"
        if isinstance(error, OutOfMemoryError):
            message = f"killed for memory by Ray's monitor: {where} during {phase}"
        elif rank.node_id not in alive:
            message = f"lost node {rank.node}: {where} during {phase}"
        elif isinstance(error, RayActorError):
            message = f"Ray's worker process was killed: {where} during {phase}"
        else:
            message = f"{type(error).__name__}: {where} during {phase}"
        is_memory = isinstance(error, OutOfMemoryError)
        return RankEnd(
            rank=rank.number,
            node=rank.node,
            at=time.time(),
            kind="out_of_memory" if is_memory else "lost",
            message=message,
            infrastructure=True,
            traceback="" if isinstance(error, RayActorError | OutOfMemoryError) else str(error),
            tail=_last_lines(rank.log, rank.log_start),
        )

    def _check_stop(self) -> None:
        if self._stop.asked_at is None:
            return
        deadline = self._stop.asked_at + self._stop.grace_s
        self._abort_at = deadline if self._abort_at is None else min(self._abort_at, deadline)

    def _check_answers(self) -> None:
        """Say who does not answer, and end what does not for too long: at once where the node takes no connection."""
        silent = {rank.number: self._answers.silent_s(rank.number) for rank in self._calls.values()}
        longest_s = max(silent.values(), default=0.0)
        if longest_s < SAY_AFTER_S < self._say_at:
            self._on_wait("")
            self._look_at = self._say_at = SAY_AFTER_S
        if longest_s < self._look_at:
            return
        self._look_at = longest_s + 1.0
        limit_s = self._spec.stall_after_s or UNLIMITED_S
        quiet = [rank for rank in self._calls.values() if silent[rank.number] >= SAY_AFTER_S]
        if longest_s >= self._say_at:
            self._say_at += SAY_AFTER_S
            self._on_wait(f"no answer from {_nodes(quiet)} for {longest_s:.0f} s")
        cut_off = self._session.cut_off({rank.node_id for rank in quiet})
        for rank in quiet:
            rank.is_cut_off, silent_s = rank.node_id in cut_off, silent[rank.number]
            where = f"rank {rank.number} on node {rank.node} during {rank.pulse.get('phase') or 'start'}"
            if rank.is_cut_off and silent_s >= LOST_AFTER_S:
                self._session.avoid(rank.node_id)
                self._give_up(rank, "lost", f"lost node {rank.node}: no answer for {silent_s:.0f} s: {where}", silent_s)
            elif silent_s >= limit_s:
                message = f"Ray's worker process does not answer for {silent_s:.0f} s: {where}"
                self._give_up(rank, "stall", message, silent_s)

    def _give_up(self, rank: Rank, kind: VerdictKind, message: str, silent_s: float) -> None:
        """End a rank whose worker does not answer, without it."""
        end = RankEnd(
            rank=rank.number,
            node=rank.node,
            at=time.time() - silent_s,
            kind=kind,
            message=message,
            infrastructure=True,
            tail=_last_lines(rank.log, rank.log_start),
        )
        self._collect_stacks([other for other in self._calls.values() if other is not rank and not other.is_cut_off])
        for calls in (self._calls, self._polls):
            for call in [call for call, other in calls.items() if other is rank]:
                del calls[call]
                # Taken when it comes: Ray prints an error that nobody took.
                call.future().add_done_callback(Future.exception)
        self._ends[rank.number] = end
        self.lost.append(rank)
        ray.kill(rank.actor)
        self._abort_at = time.monotonic()

    def _collect_stacks(self, ranks: Sequence[Rank]) -> None:
        calls = {rank.number: rank.actor.stacks.remote() for rank in ranks if rank.number not in self._stacks}
        ready, _ = (
            ray.wait(list(calls.values()), num_returns=len(calls), timeout=STACKS_TIMEOUT_S) if calls else ([], [])
        )
        for number, call in calls.items():
            if call in ready:
                with contextlib.suppress(RayError):
                    self._stacks[number] = ray.get(call)

    def _check_stall(self) -> None:
        spec = self._spec
        if self._stalled or self._abort_at is not None:
            return
        pulses = {
            rank.number: Pulse(
                rank.pulse["phase"],
                rank.pulse["silent_s"] + self._answers.silent_s(rank.number),
                rank.pulse["progress"],
                rank.pulse["stopped_s"],
            )
            for rank in self._calls.values()
            if "phase" in rank.pulse
        }
        least_s = spec.stall_after_s or UNLIMITED_S
        late = find_stall(pulses, spec.stall_limits_s, least_s, self._pace.limit_s(least_s))
        if not late:
            return
        self._collect_stacks(list(self._calls.values()))
        odd = odd_rank(pulses, self._stacks)
        rank = next(rank for rank in self._ranks if rank.number == odd)
        pulse = pulses[odd]
        step = f" at step {pulse.progress['step']}" if "step" in pulse.progress else ""
        silent_s = max(pulses[number].silent_s for number in late)
        stopped = " (its process is stopped)" if pulse.stopped_s else ""
        self._stalled = RankEnd(
            rank=odd,
            node=rank.node,
            at=0.0,  # before the ends that the kill brings
            kind="stall",
            message=f"no progress for {silent_s:.0f} s: rank {odd} on node {rank.node} holds up the group in "
            f"{pulse.phase}{step}{stopped}",
            infrastructure=True,
            traceback=self._stacks.get(odd, ""),
            tail=_last_lines(rank.log, rank.log_start),
        )
        self._abort_at = time.monotonic()

    def _check_abort(self) -> None:
        if self._abort_at is None or time.monotonic() < self._abort_at:
            return
        for rank in self._calls.values():
            rank.actor.abort.remote()
        for call in self._wait_for_rest():
            self._take_end(call, self._calls.pop(call))
        for rank in self._calls.values():
            # Not even its worker answers: end that as well.
            ray.kill(rank.actor)

    def _wait_for_rest(self) -> list[Any]:
        calls = list(self._calls)
        return ray.wait(calls, num_returns=len(calls), timeout=CALL_TIMEOUT_S)[0] if calls else []

    # Logs of workers that do not see this machine's files

    def _append_log(self, rank: Rank, data: bytes) -> None:
        """Keep what came; what finds no room on this disk is asked for again at the next pulse."""
        if data:
            fd = os.open(rank.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                rank.log_offset += os.write(fd, data)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
            finally:
                os.close(fd)

    def _fetch_logs(self) -> None:
        for rank in self._ranks:
            deadline = time.monotonic() + CALL_TIMEOUT_S
            while rank.ships_log and not rank.is_cut_off and time.monotonic() < deadline:
                offset = rank.log_offset
                try:
                    data = ray.get(rank.actor.read_log.remote(rank.log_offset), timeout=CALL_TIMEOUT_S)
                except RayError:
                    self._append_log(rank, _take_from(rank))
                    break
                self._append_log(rank, data)
                if rank.log_offset == offset:
                    break


def _nodes(ranks: Sequence[Rank]) -> str:
    """Which nodes these ranks are on, in words."""
    addresses = sorted({rank.node for rank in ranks})
    return f"node{'s' if len(addresses) > 1 else ''} {', '.join(addresses)}"


def _take_from(rank: Rank) -> bytes:
    """What a node still has of the log of a worker that is gone; nothing if the node is gone too."""
    take = ray.remote(take_folder).options(
        num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(rank.node_id, soft=False)
    )
    with contextlib.suppress(RayError):
        call = take.remote(rank.info["log_folder"], rank.written_log, rank.log_offset)
        return bytes(ray.get(call, timeout=CALL_TIMEOUT_S))
    return b""


def _last_lines(log: Path, start: int) -> tuple[str, ...]:
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(max(start, log.stat().st_size - 16_384))
        return tuple(file.read().decode(errors="replace").splitlines()[-50:])
    return ()
