"""What happens to the stages of a run: written into the journal, and shown to the people who watch."""

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.protocol import Json, Verdict
from launch.records.journal import Journal
from launch.report.progress import PLAIN_EVERY_S, View, merge_losses, rows_lost
from launch.runs.heartbeat import Latest
from recipes.planning.plan import PlannedStage
from trainers.store.manifest import ArtifactManifest

PATIENT = ("label",)
"""Phases in which nothing may happen for days."""


class StageEvents:
    """The journal and the view of a run; `latest` is the newest beat, which the heartbeat reads."""

    def __init__(self, journal: Journal, view: View) -> None:
        self.latest = Latest()
        self._journal = journal
        self._view = view
        self._stage_at = self._noted_at = 0.0
        self._notes: set[tuple[str, str]] = set()
        self._lock = threading.Lock()

    def say(self, text: str) -> None:
        """Show a line."""
        self._view.say(text)

    def started(self, planned: PlannedStage, attempt: int) -> None:
        """A stage is about to be computed."""
        self._journal.write(
            "stage_started",
            stage=planned.name,
            attempt=attempt,
            fingerprint=planned.fingerprint,
            workers=planned.workers,
            precision=planned.precision,
            engine=planned.engine,
        )
        self._view.stage_started(planned.name, attempt)
        self._stage_at, self._noted_at = time.monotonic(), 0.0
        with self._lock:
            self._set_latest(planned.name, "start", {})

    def ended(self) -> None:
        """Nothing is computed until the next stage starts."""
        with self._lock:
            self.latest.stage = None

    def waiting(self, text: str) -> None:
        """Keep for `status`, and show, what the run waits for; "" when that is over."""
        self._journal.write("waiting", text=text)
        if text:
            self._view.say(text)

    def refused(self, stage: str, message: str) -> None:
        """A gate refused an input of a stage."""
        verdict = {"kind": "gate", "message": message}
        self._journal.write("stage_failed", stage=stage, verdict=verdict, retry=False)
        self._view.stage_finished(stage, "failed", None, "refused by a gate")

    def show_silence(self) -> None:
        """Show the stage's line again while nothing is heard of it, with how long it has been silent."""
        with self._lock:
            latest, silent_s = self.latest, time.monotonic() - self.latest.at
            is_expected = latest.phase in PATIENT
            if latest.stage is not None and latest.phase is not None and silent_s >= PLAIN_EVERY_S and not is_expected:
                self._view.beat(latest.stage, latest.phase, {**latest.values, "silent_s": silent_s})

    def beat(self, stage: str, rank: int, phase: str, values: Json) -> None:
        """Take a beat of a rank; only the first rank's is shown."""
        if rank == 0:
            self.phase(stage, phase, values)

    def phase(self, stage: str, phase: str, values: Mapping[str, Any]) -> None:
        """Show what a stage is doing, and note in the journal that it turned to something else."""
        changed = phase != self.latest.phase
        now = time.monotonic()
        self._tell_notes(stage, values.get("notes", ()))
        heard = {key: value for key, value in values.items() if key != "notes"}
        with self._lock:
            self._set_latest(stage, phase, {**(self.latest.values if not changed else {}), **heard})
        # The longer a stage runs, the fewer of its phases are noted.
        if changed and now - self._noted_at > min(60.0, 0.01 * (now - self._stage_at)):
            self._noted_at = now
            self._journal.write("phase", stage=stage, phase=phase, step=values.get("step"), steps=values.get("steps"))
        with self._lock:
            self._view.beat(stage, phase, self.latest.values)

    def _set_latest(self, stage: str, phase: str, values: dict[str, Any]) -> None:
        self.latest.stage, self.latest.phase, self.latest.values = stage, phase, values
        self.latest.at = time.monotonic()

    def _tell_notes(self, stage: str, notes: Sequence[str]) -> None:
        """Show what a stage has to say, and keep it in the journal; each text once."""
        for text in notes:
            if (stage, text) not in self._notes:
                self._notes.add((stage, text))
                self._journal.write("note", stage=stage, text=text)
                self._view.say(f"{stage}: {text}")

    def committed(self, name: str, manifest: ArtifactManifest, *, cached: bool, seconds: float) -> None:
        """A stage's artifact is in the store."""
        self._journal.write(
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
        self._view.stage_finished(name, state, took_s, " · ".join(details))

    def failed(self, stage: str, attempt: int, verdict: Verdict, given_up: str | None) -> None:
        """An attempt failed; `given_up` says why there is no other, None: there is one."""
        self._journal.write(
            "stage_failed",
            stage=stage,
            attempt=attempt,
            verdict=verdict.to_json(),
            retry=given_up is None,
            why=given_up,
        )
        if given_up is not None:
            self._view.stage_finished(stage, "failed", None, verdict.message)
