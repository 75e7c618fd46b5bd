"""Walks a plan: skips what the store has, runs the rest stage by stage, verifies, commits, and keeps the journal."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any

from cluster.protocol import Json, Verdict, WorkerFailed
from cluster.supervise import Attempt, Fail, Retry, decide
from launch.report.progress import PLAIN_EVERY_S, View, merge_losses, rows_lost
from launch.runs.journal import Journal, interval_s
from launch.runs.resolve import Resolved
from launch.runs.worker_pool import WorkerPool
from recipes.errors import Preempted, StageError, TrainwrightError, VerificationError
from recipes.planning.plan import Plan, PlannedStage
from recipes.stages.kinds import COUNTED, SHOWN_METRICS
from trainers.store.manifest import ArtifactManifest
from trainers.store.store import Store

BEAT_KEYS = ("step", "steps", "unit", "row", "rows", *SHOWN_METRICS, *(f"{counted}_per_s" for counted in COUNTED))


@dataclass(frozen=True)
class StageResult:
    """How one stage of a run ended."""

    name: str
    kind: str
    cached: bool
    manifest: ArtifactManifest
    seconds: float
    attempts: int

    @property
    def gate_failed(self) -> bool:
        """Whether the artifact carries a failed gate."""
        return not self.manifest.gate.passed


class StopSignal:
    """Set once by SIGTERM, SIGHUP or a stop request in the store; tells the pool at once."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._listeners: list[Callable[[], None]] = []

    def listen(self, listener: Callable[[], None]) -> None:
        """Call `listener` when the stop comes, or now if it came already."""
        self._listeners.append(listener)
        if self._event.is_set():
            listener()

    def set(self) -> None:
        """Ask for the stop; idempotent."""
        if not self._event.is_set():
            self._event.set()
            for listener in self._listeners:
                listener()

    def is_set(self) -> bool:
        """Whether the stop was asked for."""
        return self._event.is_set()

    def wait(self, seconds: float) -> bool:
        """Sleep, at most until the stop comes; True if it came."""
        return self._event.wait(seconds)


@contextlib.contextmanager
def stop_on_signals(stop: StopSignal) -> Iterator[Callable[[], None]]:
    """SIGTERM and SIGHUP set the stop while the block runs (in the main thread; elsewhere nothing changes).

    Gives a function that installs the handlers again: Ray's native code puts its own in their place.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        # A handler may interrupt code that holds a lock of the pool, so the listeners run in a thread of their own.
        threading.Thread(target=stop.set, daemon=True).start()

    def install() -> None:
        for number in before:
            signal.signal(number, on_signal)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    install()
    try:
        yield install
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
    ) -> None:
        self.on_tick: Callable[[], None] | None = None
        self._journal = journal
        self._latest = latest
        self._stop = stop
        self._asked_to_stop = asked_to_stop
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
                if self.on_tick is not None:
                    self.on_tick()
                if not self._stop.is_set() and self._asked_to_stop():
                    self._stop.set()
                if now - last >= next_s:
                    last = now
                    latest = self._latest
                    values = {key: latest.values[key] for key in BEAT_KEYS if key in latest.values}
                    self._journal.write(
                        "progress", next_s=round(next_s, 1), stage=latest.stage, phase=latest.phase, **values
                    )


class Executor:
    """One walk through a plan. `pool` is asked for when the first stage has to be computed, never before."""

    def __init__(
        self,
        run: str,
        resolved: Resolved,
        plan: Plan,
        store: Store,
        journal: Journal,
        view: View,
        pool: Callable[[int], WorkerPool],
        stop: StopSignal,
        latest: Latest,
        results: dict[str, StageResult] | None = None,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        self.run = run
        self.resolved = resolved
        self.plan = plan
        self.store = store
        self.journal = journal
        self.view = view
        self.stop = stop
        self.latest = latest
        self.results: dict[str, StageResult] = {} if results is None else results
        self._make_pool = pool
        self._pool: WorkerPool | None = None
        self._stage_at = self._noted_at = 0.0
        self._sleep = sleep or stop.wait
        self._notes: set[tuple[str, str]] = set()
        self._lock = threading.Lock()

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
            self._commit_event(name, done, cached=True, seconds=0.0)
            return StageResult(name, kind, True, done, 0.0, 0)
        manifest, attempts = self._attempts(planned, inputs)
        seconds = time.monotonic() - started
        self._commit_event(name, manifest, cached=False, seconds=seconds)
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
                    f"stages.{name}.{field_path}: {manifest.stage} did not pass its gate: {reasons}; "
                    f"mend {manifest.stage}, or set stages.{name}.gate=ignore to go on all the same"
                )
                self.journal.write(
                    "stage_failed", stage=name, verdict={"kind": "gate", "message": message}, retry=False
                )
                self.view.stage_finished(name, "failed", None, "refused by a gate")
                raise StageError(message)

    def _attempts(self, planned: PlannedStage, inputs: dict[str, ArtifactManifest]) -> tuple[ArtifactManifest, int]:
        """Compute a stage, again after infrastructure failures as the policy allows; returns the last lease too."""
        name, max_retries = planned.name, self.resolved.recipe.cluster.max_retries
        attempts: list[Attempt] = []
        while True:
            lease = self.store.take_lease(self.run, name)
            try:
                return self._attempt(planned, inputs, lease), lease
            except WorkerFailed as failure:
                if failure.verdict.kind == "stopped":
                    raise Preempted("stopped before the workers had saved; what was saved before is kept") from failure
                state = self.store.latest_state(self.run, name, hashed=False)  # the workers hash it
                attempts.append(Attempt(failure.verdict, state.step if state else 0))
                match decide(attempts, max_retries):
                    case Fail(reason=reason):
                        self._failure_event(name, lease, failure.verdict, reason)
                        raise
                    case Retry(delay_s=delay_s):
                        self._failure_event(name, lease, failure.verdict, None)
                        soon = f" in {delay_s:.0f} s" if delay_s else ""
                        self.view.say(f"{name}: {failure.verdict.message}; trying again{soon}")
                        self._sleep(delay_s)
                        self._raise_if_stopped()

    def _attempt(self, planned: PlannedStage, inputs: dict[str, ArtifactManifest], lease: int) -> ArtifactManifest:
        name = planned.name
        self.journal.write(
            "stage_started",
            stage=name,
            attempt=lease,
            fingerprint=planned.fingerprint,
            workers=planned.workers,
            precision=planned.precision,
            engine=planned.engine,
        )
        self.view.stage_started(name, lease)
        self._stage_at, self._noted_at = time.monotonic(), 0.0
        with self._lock:
            self._set_latest(name, "start", {})
        job: Json = {
            "run": self.run,
            "stage": name,
            "attempt": lease,
            "lease": lease,
            "store": self.store.uri,
            "recipe": self.resolved.recipe_json,
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
            return self._compute(planned, inputs, lease, job)
        finally:
            with self._lock:
                self.latest.stage = None

    def _compute(
        self, planned: PlannedStage, inputs: dict[str, ArtifactManifest], lease: int, job: Json
    ) -> ArtifactManifest:
        """Let the pool make a candidate, verify and commit it."""
        name = planned.name
        pool = self._ready_pool(planned.workers)
        label = f"{name}-{lease}"
        result = pool.train(job, planned.workers, label, lambda *beat: self._on_beat(name, *beat))
        candidate = result.get("candidate")
        if candidate is None:
            raise StageError(f"{name}: the workers returned no artifact")
        self._phase(name, "verify", {})
        verified = self._verified(pool, name, {**job, **result}, f"{label}-verify")
        self._phase(name, "commit", {})
        manifest = ArtifactManifest.model_validate({**candidate, **verified})
        self._check_candidate(manifest, planned, inputs)
        self.store.check_lease(self.run, name, lease)
        return self.store.put_artifact(manifest).manifest

    def _verified(self, pool: WorkerPool, name: str, job: Json, label: str) -> Json:
        """The candidate's verification and gate, as fields of its manifest.

        Files that are not the live model are committed with a failed gate where the stage says so; else the trained
        state is kept, and `resume` writes and verifies the files again.
        """
        try:
            return {"verification": pool.verify(job, label)}
        except WorkerFailed as failure:
            if failure.verdict.error not in (StageError.__name__, VerificationError.__name__):
                raise
            reason = f"verification: {failure.verdict.message}"
            if self.resolved.recipe.stages[name].verification == "enforce":
                told = (
                    f"{reason}; the trained state is kept: `trainwright resume {self.run}` writes and verifies the "
                    f"files again, and with `--set stages.{name}.verification=ignore` commits them with a failed gate"
                )
                raise WorkerFailed(replace(failure.verdict, message=told)) from failure
            gate = job["candidate"]["gate"]
            return {
                "verification": {"how": "failed"},
                "gate": {"passed": False, "reasons": [*gate["reasons"], reason]},
            }

    def _check_candidate(
        self, manifest: ArtifactManifest, planned: PlannedStage, inputs: Mapping[str, ArtifactManifest]
    ) -> None:
        """A candidate says what it is and what it was made from; neither may differ from what was asked."""
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

    def _on_beat(self, stage: str, rank: int, phase: str, values: Json) -> None:
        if rank == 0:
            self._phase(stage, phase, values)

    def show_silence(self) -> None:
        """Show the stage's line again while nothing is heard of it, with how long it has been silent."""
        with self._lock:
            latest, silent_s = self.latest, time.monotonic() - self.latest.at
            if latest.stage is not None and latest.phase is not None and silent_s >= PLAIN_EVERY_S:
                self.view.beat(latest.stage, latest.phase, {**latest.values, "silent_s": silent_s})

    def _set_latest(self, stage: str, phase: str, values: dict[str, Any]) -> None:
        self.latest.stage, self.latest.phase, self.latest.values = stage, phase, values
        self.latest.at = time.monotonic()

    def _phase(self, stage: str, phase: str, values: Mapping[str, Any]) -> None:
        changed = phase != self.latest.phase
        now = time.monotonic()
        self._tell_notes(stage, values.get("notes", ()))
        heard = {key: value for key, value in values.items() if key != "notes"}
        with self._lock:
            self._set_latest(stage, phase, {**(self.latest.values if not changed else {}), **heard})
        # The longer a stage runs, the fewer of its phases are noted.
        if changed and now - self._noted_at > min(60.0, 0.01 * (now - self._stage_at)):
            self._noted_at = now
            self.journal.write("phase", stage=stage, phase=phase, step=values.get("step"), steps=values.get("steps"))
        with self._lock:
            self.view.beat(stage, phase, self.latest.values)

    def _tell_notes(self, stage: str, notes: Sequence[str]) -> None:
        """Show what a stage has to say, and keep it in the journal; each text once."""
        for text in notes:
            if (stage, text) not in self._notes:
                self._notes.add((stage, text))
                self.journal.write("note", stage=stage, text=text)
                self.view.say(f"{stage}: {text}")

    def _commit_event(self, name: str, manifest: ArtifactManifest, *, cached: bool, seconds: float) -> None:
        self.journal.write(
            "stage_committed",
            stage=name,
            fingerprint=manifest.fingerprint,
            digest=manifest.digest,
            cached=cached,
            seconds=round(seconds, 2),
            outcome=manifest.outcome.model_dump(mode="json"),
            gate=manifest.gate.model_dump(mode="json"),
            exactness=manifest.exactness,
        )
        details = [manifest.exactness] if manifest.exactness and not cached else []
        if not manifest.gate.passed:
            details.append("gate failed: " + "; ".join(manifest.gate.reasons))
        if not cached:
            details += rows_lost(manifest.metrics) + merge_losses(manifest)
        state, took_s = ("cached", None) if cached else ("committed", seconds)
        self.view.stage_finished(name, state, took_s, " · ".join(details))

    def _failure_event(self, stage: str, attempt: int, verdict: Verdict, given_up: str | None) -> None:
        self.journal.write(
            "stage_failed",
            stage=stage,
            attempt=attempt,
            verdict=verdict.to_json(),
            retry=given_up is None,
            why=given_up,
        )
        if given_up is not None:
            self.view.stage_finished(stage, "failed", None, verdict.message)


def unanswered_gates(resolved: Resolved, results: Mapping[str, StageResult]) -> list[str]:
    """Failed gates of artifacts that no later stage of the recipe takes: nothing else would speak of them."""
    taken = {reference.stage for references in resolved.internal.values() for reference in references.values()}
    return [
        f"{name} did not pass its gate: " + ("; ".join(result.manifest.gate.reasons) or "no reason given")
        for name, result in results.items()
        if result.gate_failed and name not in taken and resolved.recipe.stages[name].gate == "enforce"
    ]
