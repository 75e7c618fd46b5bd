"""Walks a plan: skips what the store has, runs the rest stage by stage, verifies, commits, and keeps the journal."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from cluster.protocol import Json, WorkerFailed
from cluster.supervise import Attempt, Fail, Retry, decide
from launch.inputs.resolved import Resolved
from launch.label.desk import Desk
from launch.records.stage_result import StageResult
from launch.runs.elastic import LOSSES, Growth, Sized, sizes_of, wait_for_size
from launch.runs.label_pairs import label_pairs
from launch.runs.stage_events import StageEvents
from launch.runs.stop import StopSignal
from launch.runs.worker_pool import WorkerPool
from recipes.errors import Preempted, StageError, VerificationError
from recipes.planning.plan import Plan, PlannedStage
from trainers.store.manifest import ArtifactManifest
from trainers.store.store import Store


class Executor:
    """One walk through a plan. `pool` is asked for when the first stage has to be computed, never before."""

    def __init__(
        self,
        run: str,
        resolved: Resolved,
        plan: Plan,
        store: Store,
        events: StageEvents,
        pool: Callable[[int], WorkerPool],
        stop: StopSignal,
        results: dict[str, StageResult] | None = None,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        self.run = run
        self.resolved = resolved
        self.plan = plan
        self.store = store
        self.events = events
        self.stop = stop
        self.results: dict[str, StageResult] = {} if results is None else results
        self._make_pool = pool
        self._pool: WorkerPool | None = None
        self._sleep = sleep or stop.wait

    def walk(self) -> dict[str, StageResult]:
        """Run every stage in the plan's order; raises the error of the first one that fails."""
        try:
            for planned in self.plan.stages:
                self._raise_if_stopped()
                self.results[planned.name] = self._stage(planned)
        finally:
            if self._pool is not None:
                self._pool.close()
        return self.results

    def _raise_if_stopped(self) -> None:
        if self.stop.is_set():
            raise Preempted("stopped on request")

    def inputs_of(self, stage: str) -> dict[str, ArtifactManifest]:
        """The manifests that a stage's inputs resolve to, by field path."""
        found = dict(self.resolved.external.get(stage, {}))
        for field_path, reference in self.resolved.internal.get(stage, {}).items():
            found[field_path] = self.results[reference.stage].manifest
        return found

    def _stage(self, planned: PlannedStage) -> StageResult:
        name = planned.name
        started = time.monotonic()
        inputs = self.inputs_of(name)
        self._check_gates(name, inputs)
        kind = self.resolved.recipe.stages[name].kind
        done = self.find_done(planned.fingerprint, inputs)
        if done is not None:
            self.events.committed(name, done, cached=True, seconds=0.0)
            return StageResult(name, kind, True, done, 0.0, 0)
        manifest, attempts = self._attempts(planned, inputs)
        seconds = time.monotonic() - started
        self.events.committed(name, manifest, cached=False, seconds=seconds)
        return StageResult(name, kind, False, manifest, seconds, attempts)

    def find_done(self, fingerprint: str, inputs: Mapping[str, ArtifactManifest]) -> ArtifactManifest | None:
        """The committed artifact, if it was made from the very artifacts that the inputs resolve to now."""
        found = self.store.find_artifact(fingerprint)
        if found is None:
            return None
        same = all(path in found.parents and found.parents[path].digest == made.digest for path, made in inputs.items())
        return found if same else None

    def _check_gates(self, name: str, inputs: Mapping[str, ArtifactManifest]) -> None:
        """Refuse inputs whose gate failed, unless the stage ignores gates."""
        if self.resolved.recipe.stages[name].gate == "ignore":
            return
        for field_path, manifest in inputs.items():
            if not manifest.gate.passed:
                reasons = "; ".join(manifest.gate.reasons) or "no reason given"
                message = (
                    f"stages.{name}.{field_path}: {manifest.stage} failed its gate: {reasons}; "
                    f"fix {manifest.stage}, or set stages.{name}.gate=ignore to continue anyway"
                )
                self.events.refused(name, message)
                raise StageError(message)

    def _attempts(self, planned: PlannedStage, inputs: dict[str, ArtifactManifest]) -> tuple[ArtifactManifest, int]:
        """Compute a stage, again after infrastructure failures as the policy allows; returns the last lease too."""
        name, cluster = planned.name, self.resolved.recipe.cluster
        stage = self.resolved.recipe.stages[name]
        sizes = sizes_of(stage, cluster.min_workers or planned.workers, planned.workers)
        attempts: list[Attempt] = []
        workers = planned.workers
        while True:
            growth = Growth(sizes, workers, lambda: self._ready_pool(planned.workers).room())
            lease = self.store.take_lease(self.run, name)
            try:
                return self._attempt(Sized.of(self.resolved, planned, workers), inputs, lease, growth), lease
            except Preempted:
                if self.stop.is_set() or growth.size is None:
                    raise
                workers = self._grow(planned, sizes)
            except WorkerFailed as failure:
                verdict = failure.verdict
                state = self.store.latest_state(self.run, name, hashed=False)  # the workers hash it
                attempts.append(Attempt(verdict, state.step if state else 0))
                match decide(attempts, cluster.max_retries):
                    case Fail(reason=reason):
                        self.events.failed(name, lease, verdict, reason)
                        raise
                    case Retry(delay_s=delay_s):
                        self.events.failed(name, lease, verdict, None)
                        soon = f" in {delay_s:.0f} s" if delay_s else ""
                        self.events.say(f"{name}: {verdict.message}; trying again{soon}")
                        self._pause(delay_s)
                        if verdict.kind in LOSSES:
                            workers = self._size(planned, sizes, cluster.replacement_wait_s)

    def _pause(self, seconds: float) -> None:
        self._sleep(seconds)
        self._raise_if_stopped()

    def _grow(self, planned: PlannedStage, sizes: Sequence[int]) -> int:
        """The number of workers after those that gave way have left."""
        self._ready_pool(planned.workers).release()
        return self._size(planned, sizes, 0.0)

    def _size(self, planned: PlannedStage, sizes: Sequence[int], wait_s: float) -> int:
        """On how many workers a stage continues."""
        pool = self._ready_pool(planned.workers)
        workers = wait_for_size(sizes, pool.room, wait_s, self._pause, self.events.waiting)
        self.events.say(f"{planned.name}: continuing on {workers} of {planned.workers} workers")
        return workers

    def _attempt(
        self, sized: Sized, inputs: dict[str, ArtifactManifest], lease: int, growth: Growth
    ) -> ArtifactManifest:
        planned = sized.planned
        name = planned.name
        self.events.started(planned, lease)
        job: Json = {
            "run": self.run,
            "stage": name,
            "attempt": lease,
            "lease": lease,
            "store": self.store.uri,
            "recipe": sized.resolved.recipe_json,
            "fingerprint": planned.fingerprint,
            "inputs": {path: manifest.model_dump(mode="json") for path, manifest in inputs.items()},
            "data": dict(self.resolved.data.get(name, {})),
            "workers": planned.workers,
            "base_dir": str(self.resolved.base_dir),
            "uploaded": self.resolved.uploaded,
            "changes": self.resolved.changes.get(name, []),
            "accepts": self.resolved.accepts.get(name, []),
            "replaced": self.resolved.replaced.get(name, []),
        }
        try:
            return self._compute(planned, inputs, lease, job, growth)
        except WorkerFailed as failure:
            if failure.verdict.kind == "stopped":
                raise Preempted("stopped before the workers had saved; what was saved before is kept") from failure
            raise
        finally:
            self.events.ended()

    def _compute(
        self, planned: PlannedStage, inputs: dict[str, ArtifactManifest], lease: int, job: Json, growth: Growth
    ) -> ArtifactManifest:
        """Let the pool make a candidate, verify and commit it."""
        name = planned.name
        label = f"{name}-{lease}"

        def work() -> Json:
            pool = self._ready_pool(planned.workers)

            def on_beat(rank: int, phase: str, values: Json) -> None:
                self.events.beat(name, rank, phase, values)
                if growth.is_possible(phase):
                    pool.give_way()

            return pool.train(job, planned.workers, label, on_beat)

        result = self._result(planned, work)
        candidate = result.get("candidate")
        if candidate is None:
            raise StageError(f"{name}: the workers returned no artifact")
        self.events.phase(name, "verify", {})
        verified = self._verified(name, {**job, **result}, planned.workers, f"{label}-verify")
        self.events.phase(name, "commit", {})
        manifest = ArtifactManifest.model_validate({**candidate, **verified})
        self._check_candidate(manifest, planned, inputs)
        self.store.check_lease(self.run, name, lease)
        return self.store.put_artifact(manifest).manifest

    def _result(self, planned: PlannedStage, work: Callable[[], Json]) -> Json:
        """What the workers make of a stage, and people where it waits for them: without workers."""
        labelling = self.resolved.recipe.stages[planned.name].labelling
        if labelling is None:
            return work()

        def work_and_leave() -> Json:
            result = work()
            self._ready_pool(planned.workers).release()
            return result

        desk = Desk(self.store, self.run, planned.name, planned.fingerprint)
        return label_pairs(labelling, desk, work_and_leave, self.events, self.stop)

    def _verified(self, name: str, job: Json, workers: int, label: str) -> Json:
        """The candidate's verification and gate, as fields of its manifest; no model, no worker.

        With `verification: ignore` files that differ from the live model are committed with a failed gate; otherwise
        the trained state is kept, and `resume` writes and verifies the files again.
        """
        if not job["checks"]:
            return {"verification": {"how": "files-only"}}
        try:
            return {"verification": self._ready_pool(workers).verify(job, label)}
        except WorkerFailed as failure:
            if failure.verdict.error not in (StageError.__name__, VerificationError.__name__):
                raise
            reason = f"verification: {failure.verdict.message}"
            if self.resolved.recipe.stages[name].verification == "enforce":
                message = (
                    f"{reason}; the trained state is kept: `trainwright resume {self.run}` writes and verifies the "
                    f"files again, and with `--set stages.{name}.verification=ignore` commits them with a failed gate"
                )
                raise WorkerFailed(replace(failure.verdict, message=message)) from failure
            gate = job["candidate"]["gate"]
            return {
                "verification": {"how": "failed"},
                "gate": {"passed": False, "reasons": [*gate["reasons"], reason]},
            }

    def _check_candidate(
        self, manifest: ArtifactManifest, planned: PlannedStage, inputs: Mapping[str, ArtifactManifest]
    ) -> None:
        """A candidate names its fingerprint and its parents; neither may differ from the plan."""
        made_from = {path: (parent.fingerprint, parent.digest) for path, parent in manifest.parents.items()}
        expected = {path: (made.fingerprint, made.digest) for path, made in inputs.items()}
        if manifest.fingerprint != planned.fingerprint or made_from != expected:
            raise AssertionError(
                f"{planned.name}: the candidate names another fingerprint or other parents than the plan"
            )

    def _ready_pool(self, workers: int) -> WorkerPool:
        if self._pool is None:
            self._pool = self._make_pool(workers)
            self.stop.listen(self._pool.stop)
            self._raise_if_stopped()
        return self._pool


def unanswered_gates(resolved: Resolved, results: Mapping[str, StageResult]) -> list[str]:
    """Failed gates of artifacts that no later stage of the recipe takes: nothing else would report them."""
    taken = {reference.stage for references in resolved.internal.values() for reference in references.values()}
    return [
        f"{name} failed its gate: " + ("; ".join(result.manifest.gate.reasons) or "no reason given")
        for name, result in results.items()
        if result.gate_failed and name not in taken and resolved.recipe.stages[name].gate == "enforce"
    ]
