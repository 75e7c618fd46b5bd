"""A worker group on Ray: an actor per rank in a placement group, in each a process per run; one verdict on failure."""

import contextlib
import json
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import ray
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from cluster.placement import Reservation, reserve
from cluster.protocol import Json, OnBeat, Target, Verdict, WorkerFailed, WorkerSpec
from cluster.supervise import Pulse, RankEnd, find_stall, judge, odd_rank
from cluster.topology import Request
from cluster.worker import Worker, installed_version, take_folder, this_machine
from recipes.errors import CapacityError, Preempted

if TYPE_CHECKING:
    from cluster.session import Session

WORKER_START_TIMEOUT_S = 120.0
CALL_TIMEOUT_S = 10.0
SPARES_AFTER_S = 1.0
# How long the others get to say how they ended; a broken connection waits longer, for its cause.
GRACE_S = 1.0
CONSEQUENCE_GRACE_S = 5.0


@dataclass(slots=True)
class _Rank:
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

    @property
    def ships_log(self) -> bool:
        """Whether its log is written where the driver cannot see it."""
        return bool(self.info["log_folder"])

    @property
    def written_log(self) -> str:
        """Path of the log on the rank's own node."""
        folder = self.info["log_folder"]
        return str(Path(folder) / self.log.name) if folder else str(self.log.resolve())


class RayGroup:
    """`WorkerGroup` on a connected Ray."""

    def __init__(self, session: "Session", spec: WorkerSpec, on_wait: Callable[[str], None] | None = None) -> None:
        self.spec = spec
        self._session = session
        self._on_wait = on_wait
        self._reservation: Reservation | None = None
        self._ranks: list[_Rank] = []
        self._stop_at: float | None = None
        self._stop_grace_s = spec.stop_grace_s
        self._lock = threading.Lock()
        self._is_closed = False
        self._run_id = ""
        self._place()

    def prepare_next(self) -> None:
        """Starts one spare process per rank; does not wait for it."""
        self._place()
        for rank in self._ranks:
            rank.actor.prepare.remote()

    def run(
        self, target: Target, payload: Json, on_beat: OnBeat | None = None, *, label: str = "run", spares: bool = False
    ) -> list[Json | None]:
        """Runs the target on every rank; see `WorkerGroup.run`."""
        name = target if isinstance(target, str) else f"{target.__module__}:{target.__qualname__}"
        payload = json.loads(json.dumps(payload))
        with self._lock:
            if self._stop_at is not None:
                raise Preempted("stopped before it started")
            if trouble := self._session.trouble():
                raise CapacityError(trouble)
            self._place()
            run = _Run(self, self._start(name, payload, label), on_beat, spares)
            try:
                ends = run.follow()
            except BaseException:
                run.abort()
                raise
            if run.lost:
                self._replace(run.lost)
        if all(end.kind == "result" for end in ends):
            return [end.result for end in ends]
        verdict = run.verdict(ends)
        if verdict.kind == "preempted":
            raise Preempted(verdict.message)
        raise WorkerFailed(verdict)

    def stop(self, grace_s: float | None = None) -> None:
        """Asks every rank to stop; the thread in `run` does the rest."""
        self._stop_grace_s = self.spec.stop_grace_s if grace_s is None else grace_s
        if self._stop_at is None:
            self._stop_at = time.monotonic()

    def pids(self) -> dict[int, int]:
        """Process id per rank of the run in progress."""
        return {rank.number: rank.pulse["pid"] for rank in self._ranks if "pid" in rank.pulse}

    def close(self) -> None:
        """Ends every process and gives the resources back."""
        self._is_closed = True
        self._drop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Placement

    def _place(self) -> None:
        if self._ranks:
            return
        if self._is_closed:
            raise RuntimeError(f"worker group {self.spec.name} is closed")
        spec = self.spec
        # Ray wants names that were never used: the one before may still be on its way out.
        name = f"{self._session.namespace}/{spec.name}-{uuid.uuid4().hex[:4]}"
        try:
            if spec.cpus_per_worker or spec.gpus_per_worker:
                request = Request(spec.num_workers, spec.cpus_per_worker, spec.gpus_per_worker)
                self._reservation = reserve(
                    request,
                    self._session.nodes,
                    name,
                    spec.placement_timeout_s,
                    self._on_wait,
                    lambda: self._session.is_cancelled,
                )
            self._ranks = self._start_workers()
        except BaseException:
            self._drop()
            raise

    def _start_workers(self) -> list[_Rank]:
        spec = self.spec
        here = ray.get_runtime_context().get_node_id()
        places = self._reservation.node_of_bundle if self._reservation else dict.fromkeys(range(spec.num_workers), here)
        ranks = self._start_in(places)
        ranks.sort(
            key=lambda rank: (rank.node_id != here, rank.node, rank.node_id, rank.info["gpus"], rank.info["pid"])
        )
        seen: Counter[str] = Counter()
        for number, rank in enumerate(ranks):
            rank.number, rank.local_rank = number, seen[rank.node_id]
            seen[rank.node_id] += 1
        _share_devices(ranks)
        return ranks

    def _start_in(self, places: dict[int, str]) -> list[_Rank]:
        """Workers in the given bundles, which are on the given nodes; all of them or none."""
        spec = self.spec
        actors = {
            bundle: ray.remote(Worker)
            .options(
                num_cpus=spec.cpus_per_worker,
                num_gpus=spec.gpus_per_worker,
                max_concurrency=8,
                max_restarts=0,
                scheduling_strategy=self._strategy(bundle),
            )
            .remote(dict(spec.environment), spec.preload, int(spec.cpus_per_worker), spec.gpus_per_worker > 0)
            for bundle in places
        }
        addresses = {node.id: node.address for node in self._session.nodes()}
        calls = [actor.describe.remote(addresses[places[bundle]], this_machine()) for bundle, actor in actors.items()]
        try:
            infos: list[Json] = ray.get(calls, timeout=WORKER_START_TIMEOUT_S)
            ranks = [
                _Rank(actor, bundle, places[bundle], addresses[places[bundle]], info)
                for (bundle, actor), info in zip(actors.items(), infos, strict=True)
            ]
            _require_one_version(ranks)
        except BaseException as error:
            for actor in actors.values():
                ray.kill(actor)
            if not isinstance(error, RayError):
                raise
            reason = "no answer" if isinstance(error, GetTimeoutError) else str(error).strip().splitlines()[-1]
            raise CapacityError(f"workers of {spec.name} did not start: {reason}") from error
        return ranks

    def _replace(self, lost: Sequence[_Rank]) -> None:
        """New workers where some were killed; with a node gone, the next run places the whole group anew."""
        alive = {node.id for node in self._session.nodes()}
        if any(rank.node_id not in alive for rank in lost):
            self._drop()
            return
        try:
            fresh = {rank.bundle: rank for rank in self._start_in({rank.bundle: rank.node_id for rank in lost})}
        except CapacityError:
            self._drop()
            return
        for rank in lost:
            rank.actor, rank.info = fresh[rank.bundle].actor, fresh[rank.bundle].info
        _share_devices(self._ranks)
        for rank in lost:
            rank.actor.prepare.remote()

    def _strategy(self, bundle: int) -> Any:
        if self._reservation is None:
            here = ray.get_runtime_context().get_node_id()
            return NodeAffinitySchedulingStrategy(here, soft=False)
        return PlacementGroupSchedulingStrategy(
            self._reservation.group, placement_group_bundle_index=bundle, placement_group_capture_child_tasks=False
        )

    def _drop(self) -> None:
        """Gives up every worker and the reservation; the next run places the group anew."""
        ranks, self._ranks = self._ranks, []
        calls = [rank.actor.close.remote() for rank in ranks]
        with contextlib.suppress(Exception):  # dead workers are as good as closed ones
            ray.wait(calls, num_returns=len(calls), timeout=CALL_TIMEOUT_S)
        for rank in ranks:
            with contextlib.suppress(Exception):
                ray.kill(rank.actor)
        if self._reservation:
            self._reservation.release()
            self._reservation = None

    # Start of a run

    def _start(self, target: str, payload: Json, label: str) -> dict[Any, _Rank]:
        first = self._ranks[0]
        try:
            port: int = ray.get(first.actor.free_port.remote(), timeout=CALL_TIMEOUT_S)
        except RayError:
            # A worker died between two runs: place the group anew, once.
            self._drop()
            self._place()
            first = self._ranks[0]
            port = ray.get(first.actor.free_port.remote(), timeout=CALL_TIMEOUT_S)
        together = {rank.info["machine"] for rank in self._ranks} == {first.info["machine"]}
        local_sizes = Counter(rank.node_id for rank in self._ranks)
        calls: dict[Any, _Rank] = {}
        self._run_id = uuid.uuid4().hex
        for rank in self._ranks:
            interface = "lo" if together else rank.info["interface"]
            environment = {
                "RANK": str(rank.number),
                "LOCAL_RANK": str(rank.local_rank),
                "WORLD_SIZE": str(len(self._ranks)),
                "LOCAL_WORLD_SIZE": str(local_sizes[rank.node_id]),
                "MASTER_ADDR": "127.0.0.1" if together else first.node,
                "MASTER_PORT": str(port),
            }
            if interface:
                environment |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
            rank.log = self.spec.log_folder / f"{label}-rank-{rank.number}.log"
            rank.log.parent.mkdir(parents=True, exist_ok=True)
            rank.pulse, rank.log_offset = {}, 0
            rank.log_start = rank.log.stat().st_size if rank.log.exists() else 0
            order = {
                "target": target,
                "payload": payload,
                "rank": rank.number,
                "world_size": len(self._ranks),
                "local_rank": rank.local_rank,
                "node": rank.node,
                "environment": environment,
                "log_path": rank.written_log,
                "reusable": self.spec.reusable,
                "run_id": self._run_id,
            }
            calls[rank.actor.run.remote(order)] = rank
        return calls


class _Run:
    """One run in progress: follows the beats, notices the first end, sees the rest out."""

    def __init__(self, group: RayGroup, calls: dict[Any, _Rank], on_beat: OnBeat | None, spares: bool) -> None:
        self.lost: list[_Rank] = []
        """Ranks whose worker, not only its process, is gone."""
        self._group = group
        self._spec = group.spec
        self._calls = calls
        self._ranks = list(calls.values())
        self._on_beat = on_beat
        self._wants_spares = spares
        self._polls: dict[Any, _Rank] = {}
        self._poll_at = dict.fromkeys((rank.number for rank in self._ranks), 0.0)
        self._ends: dict[int, RankEnd] = {}
        self._working_since: float | None = None
        self._abort_at: float | None = None
        self._stacks: dict[int, str] = {}
        self._stalled: RankEnd | None = None

    def follow(self) -> list[RankEnd]:
        """Until every rank has ended."""
        while self._calls:
            trouble = self._group._session.trouble()
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
            self._start_spares()
            self._check_stop()
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
        ray.wait(list(self._calls), num_returns=len(self._calls), timeout=CALL_TIMEOUT_S) if self._calls else None

    def _poll(self) -> None:
        at = time.monotonic()
        busy = {rank.number for rank in self._polls.values()}
        for rank in self._calls.values():
            if rank.number not in busy and at >= self._poll_at[rank.number]:
                self._poll_at[rank.number] = at + self._spec.beat_interval_s
                is_stopping = self._group._stop_at is not None
                pulse = rank.actor.pulse.remote(self._group._run_id, rank.log_offset, rank.ships_log, is_stopping)
                self._polls[pulse] = rank

    def _take_pulse(self, call: Any, rank: _Rank) -> None:
        try:
            pulse: Json = ray.get(call)
        except RayError:
            return  # the call of the run says what happened
        if not pulse:
            return
        self._append_log(rank, pulse.pop("log", b""))
        is_first = not rank.pulse
        is_new = pulse["number"] != rank.pulse.get("number")
        rank.pulse = pulse
        if is_first:
            self._group._session.watch([pulse["pid"]])
        if is_new and rank.number not in self._ends:
            self._tell(rank, pulse["phase"], pulse["progress"])

    def _tell(self, rank: _Rank, phase: str, progress: Json) -> None:
        if phase not in ("", "start") and self._on_beat:
            self._on_beat(rank.number, phase, progress)

    def _take_end(self, call: Any, rank: _Rank) -> None:
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
                grace = self._group._stop_grace_s
            self._abort_at = time.monotonic() + grace

    def _lost(self, rank: _Rank, error: RayError) -> RankEnd:
        alive = {node.id for node in self._group._session.nodes()}
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

    def _start_spares(self) -> None:
        if not self._wants_spares or self._abort_at is not None:
            return
        if self._working_since is None:
            if all(rank.pulse.get("phase") not in (None, "", "start") for rank in self._ranks):
                self._working_since = time.monotonic()
        elif time.monotonic() - self._working_since > SPARES_AFTER_S:
            self._wants_spares = False
            for rank in self._calls.values():
                rank.actor.prepare.remote()

    def _check_stop(self) -> None:
        asked_at = self._group._stop_at
        if asked_at is None:
            return
        deadline = asked_at + self._group._stop_grace_s
        self._abort_at = deadline if self._abort_at is None else min(self._abort_at, deadline)

    def _check_stall(self) -> None:
        if self._stalled or not self._spec.stall_limits_s:
            return
        pulses = {
            rank.number: Pulse(rank.pulse["phase"], rank.pulse["silent_s"], rank.pulse["progress"])
            for rank in self._calls.values()
            if "phase" in rank.pulse
        }
        late = find_stall(pulses, self._spec.stall_limits_s)
        if not late:
            return
        stacks = {rank.number: rank.actor.stacks.remote() for rank in self._calls.values()}
        for number, call in stacks.items():
            with contextlib.suppress(RayError):
                self._stacks[number] = ray.get(call, timeout=CALL_TIMEOUT_S)
        odd = odd_rank(pulses, self._stacks)
        rank = next(rank for rank in self._ranks if rank.number == odd)
        pulse = pulses[odd]
        step = f" at step {pulse.progress['step']}" if "step" in pulse.progress else ""
        silent_s = max(pulses[number].silent_s for number in late)
        self._stalled = RankEnd(
            rank=odd,
            node=rank.node,
            at=0.0,  # before the ends that the kill brings
            kind="stall",
            message=f"no progress for {silent_s:.0f} s: rank {odd} on node {rank.node} holds up the group in "
            f"{pulse.phase}{step}",
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
        ready, _ = (
            ray.wait(list(self._calls), num_returns=len(self._calls), timeout=CALL_TIMEOUT_S)
            if self._calls
            else ([], [])
        )
        for call in ready:
            self._take_end(call, self._calls.pop(call))
        for rank in self._calls.values():
            # Not even its worker answers: end that as well.
            ray.kill(rank.actor)

    # Logs of workers that do not see this machine's files

    def _append_log(self, rank: _Rank, data: bytes) -> None:
        if data:
            with rank.log.open("ab") as log:
                log.write(data)
            rank.log_offset += len(data)

    def _fetch_logs(self) -> None:
        for rank in self._ranks:
            deadline = time.monotonic() + CALL_TIMEOUT_S
            while rank.ships_log and time.monotonic() < deadline:
                try:
                    data = ray.get(rank.actor.read_log.remote(rank.log_offset), timeout=CALL_TIMEOUT_S)
                except RayError:
                    self._append_log(rank, _take_from(rank))
                    break
                if not data:
                    break
                self._append_log(rank, data)


def _take_from(rank: _Rank) -> bytes:
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


def _share_devices(ranks: Sequence[_Rank]) -> None:
    """LOCAL_RANK indexes the group's devices on the node, and peers reach each other's memory, as under torchrun."""
    calls = []
    for rank in ranks:
        devices = [gpu for other in ranks if other.node_id == rank.node_id for gpu in other.info["gpus"]]
        if devices:
            calls.append(rank.actor.see_devices.remote(",".join(devices)))
    ray.get(calls, timeout=CALL_TIMEOUT_S)


def _require_one_version(ranks: Sequence[_Rank]) -> None:
    ours = installed_version()
    for rank in ranks:
        if rank.info["version"] != ours:
            theirs = rank.info["version"]
            raise CapacityError(
                f"node {rank.node} has trainwright {theirs}, the driver {ours}: install the same on every node"
            )
