"""A worker group on Ray: an actor per rank in a placement group, in each a process per run; one verdict on failure."""

import contextlib
import json
import secrets
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from cluster.placement import Reservation, reserve
from cluster.protocol import Json, OnBeat, Target, WorkerFailed, WorkerSpec
from cluster.ray_run import CALL_TIMEOUT_S, Rank, Run, StopWish
from cluster.topology import Request
from cluster.worker import Worker, installed_versions, this_machine
from recipes.errors import CapacityError, Preempted

if TYPE_CHECKING:
    from cluster.session import Session

WORKER_START_TIMEOUT_S = 120.0
CLOSE_TIMEOUT_S = 3.0
"""Of workers that are refused."""


class RayGroup:
    """`WorkerGroup` on a connected Ray: its resources are held from now on.

    `on_wait` is told who holds them while it waits, and in a run which node does not answer; "" when that is over.
    Raises `CapacityError` at once when the cluster can never take it, or when the spec's deadline passes.
    """

    def __init__(self, session: "Session", spec: WorkerSpec, on_wait: Callable[[str], None] | None = None) -> None:
        self.spec = spec
        self._session = session
        self._on_wait = on_wait or (lambda text: None)
        self._reservation: Reservation | None = None
        self._ranks: list[Rank] = []
        self._stop = StopWish(spec.stop_grace_s)
        self._lock = threading.Lock()
        self._is_closed = False
        self._place()
        session.close_at_shutdown(self)

    @property
    def num_placed(self) -> int:
        """How many workers there are: none after a node was lost."""
        return len(self._ranks)

    def prepare(self) -> None:
        """Starts every rank's imports; does not wait for them."""
        self._place()
        for rank in self._ranks:
            rank.actor.prepare.remote()

    def run(
        self, target: Target, payload: Json, on_beat: OnBeat | None = None, *, label: str = "run"
    ) -> list[Json | None]:
        """Runs the target on every rank; see `WorkerGroup.run`."""
        name = target if isinstance(target, str) else f"{target.__module__}:{target.__qualname__}"
        payload = json.loads(json.dumps(payload))
        with self._lock:
            if self._stop.asked_at is not None:
                raise Preempted("stopped before it started")
            if trouble := self._session.trouble():
                raise CapacityError(trouble)
            self._place()
            run_id = uuid.uuid4().hex
            calls = self._start(run_id, name, payload, label)
            run = Run(self._session, self.spec, run_id, calls, on_beat, self._stop, self._on_wait)
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
        self._stop.grace_s = self.spec.stop_grace_s if grace_s is None else grace_s
        if self._stop.asked_at is None:
            self._stop.asked_at = time.monotonic()

    def pids(self) -> dict[int, int]:
        """Process id per rank of the run in progress."""
        return {rank.number: rank.pulse["pid"] for rank in self._ranks if rank.pulse.get("pid")}

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
                    self._session.avoided(),
                )
            self._ranks = self._start_workers()
        except BaseException:
            self._drop()
            raise

    def _start_workers(self) -> list[Rank]:
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

    def _start_in(self, places: dict[int, str]) -> list[Rank]:
        """Workers in the given bundles, which are on the given nodes; all of them or none."""
        spec = self.spec
        addresses = {node.id: node.address for node in self._session.nodes()}
        if gone := {node for node in places.values() if node not in addresses}:
            raise CapacityError(f"workers of {spec.name} did not start: {len(gone)} of their nodes are gone")
        actors = {
            bundle: ray.remote(Worker)
            .options(
                num_cpus=spec.cpus_per_worker,
                num_gpus=spec.gpus_per_worker,
                max_concurrency=8,
                max_restarts=0,
                scheduling_strategy=self._strategy(bundle),
            )
            .remote(
                {**self._session.rank_environment, **spec.environment},
                spec.preload,
                int(spec.cpus_per_worker),
                spec.gpus_per_worker > 0,
                self._session.fork_server(spec),
            )
            for bundle in places
        }
        calls = [actor.describe.remote(addresses[places[bundle]], this_machine()) for bundle, actor in actors.items()]
        try:
            infos: list[Json] = ray.get(calls, timeout=WORKER_START_TIMEOUT_S)
            ranks = [
                Rank(actor, bundle, places[bundle], addresses[places[bundle]], info)
                for (bundle, actor), info in zip(actors.items(), infos, strict=True)
            ]
            require_one_version(installed_versions(), {rank.node: rank.info["versions"] for rank in ranks})
        except BaseException as error:
            closing = [actor.close.remote() for actor in actors.values()]  # also removes the folders for its logs
            ray.wait(closing, num_returns=len(closing), timeout=CLOSE_TIMEOUT_S)
            for actor in actors.values():
                ray.kill(actor)
            if not isinstance(error, RayError):
                raise
            reason = "no answer" if isinstance(error, GetTimeoutError) else str(error).strip().splitlines()[-1]
            raise CapacityError(f"workers of {spec.name} did not start: {reason}") from error
        return ranks

    def _replace(self, lost: Sequence[Rank]) -> None:
        """New workers where some were killed; with a node gone, the next run places the whole group again."""
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
        """Gives up every worker and the reservation; the next run places the group again."""
        ranks, self._ranks = self._ranks, []
        if self._session.trouble():
            # Ray would wait a minute for what has ended, and then end this process; the rest has ended with it.
            self._reservation = None
            return
        calls = [rank.actor.close.remote() for rank in ranks if not rank.is_cut_off]
        with contextlib.suppress(Exception):  # dead workers are as good as closed ones
            ray.wait(calls, num_returns=len(calls), timeout=CALL_TIMEOUT_S)
        for rank in ranks:
            with contextlib.suppress(Exception):
                ray.kill(rank.actor)
        if self._reservation:
            self._reservation.release()
            self._reservation = None

    # Start of a run

    def _start(self, run_id: str, target: str, payload: Json, label: str) -> dict[Any, Rank]:
        first = self._ranks[0]
        try:
            port: int = ray.get(first.actor.free_port.remote(), timeout=CALL_TIMEOUT_S)
        except RayError:
            # A worker died between two runs: place the group again, once.
            self._drop()
            self._place()
            first = self._ranks[0]
            port = ray.get(first.actor.free_port.remote(), timeout=CALL_TIMEOUT_S)
        together = {rank.info["machine"] for rank in self._ranks} == {first.info["machine"]}
        local_sizes = Counter(rank.node_id for rank in self._ranks)
        group_key = secrets.token_hex(16)
        calls: dict[Any, Rank] = {}
        for rank in self._ranks:
            interface = "lo" if together else rank.info["interface"]
            environment = {
                "RANK": str(rank.number),
                "LOCAL_RANK": str(rank.local_rank),
                "WORLD_SIZE": str(len(self._ranks)),
                "LOCAL_WORLD_SIZE": str(local_sizes[rank.node_id]),
                "MASTER_ADDR": "127.0.0.1" if together else first.node,
                "MASTER_PORT": str(port),
                "TRAINWRIGHT_GROUP_KEY": group_key,
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
                "run_id": run_id,
            }
            calls[rank.actor.run.remote(order)] = rank
        return calls


def _share_devices(ranks: Sequence[Rank]) -> None:
    """LOCAL_RANK indexes the group's devices on the node, and peers reach each other's memory, as under torchrun."""
    calls = []
    for rank in ranks:
        devices = [gpu for other in ranks if other.node_id == rank.node_id for gpu in other.info["gpus"]]
        if devices:
            calls.append(rank.actor.see_devices.remote(",".join(devices)))
    ray.get(calls, timeout=CALL_TIMEOUT_S)


def require_one_version(ours: Mapping[str, str], by_node: Mapping[str, Mapping[str, str]]) -> None:
    """Raises `CapacityError` that names the first node with another version of what ranks compute by."""
    for node, theirs in by_node.items():
        other = [
            f"{name} {theirs.get(name)} (the driver: {ours[name]})" for name in ours if theirs.get(name) != ours[name]
        ]
        if other:
            raise CapacityError(f"node {node} has {', '.join(other)}: install the same on every node")
