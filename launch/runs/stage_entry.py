"""What runs in a worker: from a job to a stage's function, and from a candidate to its verification.

Both functions are targets of a worker group; everything that crosses the process border is JSON.
"""

import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.protocol import Json, WorkerContext
from launch.inputs.feedback import with_feedback_rows
from launch.records.journal import interval_s
from recipes.errors import CapacityError
from recipes.loading.load import parse_recipe
from recipes.models.architecture import MODEL_TYPES
from recipes.models.base import TextFamily
from recipes.stages.answers import Progress
from recipes.stages.evaluate import Evaluate
from recipes.stages.feedback import Feedback
from recipes.stages.kinds import Stage
from recipes.stages.preference import Preference
from recipes.stages.reward import Reward
from recipes.stages.rl import RlStage
from recipes.stages.training_stage import ImageTraining, TextTraining

if TYPE_CHECKING:
    from trainers.runtime.distributed import Ranks
    from trainers.store.store import Store
    from trainers.training.context import Candidate, StageContext

FIRST_FLUSH_S = 5.0
"""Metrics reach the store this often at first, later ever more rarely (`interval_s`), and always before the state that
follows from them and when the stage is asked to stop."""
ROOM_WAIT_S = 1200.0
"""How long a worker or the driver waits for room on a full disk; less than the time after which silence is a stall."""


class StageObserver:
    """Tells the driver where this rank is; rank 0 also writes the run's metric segments."""

    def __init__(
        self, worker: WorkerContext, store: "Store", job: Json, progress: Progress, shown: Sequence[str] = ()
    ) -> None:
        self._worker = worker
        self._progress = progress
        self._named = tuple(shown)
        self._writer = None
        if worker.rank == 0:
            self._writer = store.run(job["run"]).writer(f"metrics/{job['stage']}/{job['attempt']}")
        self._began_at = self._flushed_at = time.monotonic()
        self._shown: dict[str, float] = {}
        self._iteration_at: float | None = None
        self._phase = ("start", time.monotonic(), 0)
        """What happens now, since when rows are counted, and from how many on."""
        self._notes: list[str] = []

    def phase(self, name: str, **progress: float) -> None:
        """Beat with what happens now, and how far it is; metrics are durable before a state is."""
        self._flush(is_due=name in ("save", "write"))
        place: dict[str, Any] = {}
        if "step" in progress:
            size = self._progress.steps_per_unit
            done, planned = int(progress["step"]) // size, int(progress["steps_planned"]) // size
            place = {"step": done, "steps": planned, "unit": self._progress.unit}
        place |= self._rows(name, progress)
        notes = {"notes": self._notes} if self._notes else {}
        self._worker.beat(name, **self._shown, **place, **notes)

    def _rows(self, name: str, progress: Mapping[str, float]) -> dict[str, Any]:
        """How many rows of the phase are done, of how many where that is known, and how many a second."""
        now, done = time.monotonic(), int(progress.get("rows", 0))
        if name != self._phase[0] or ("rows" in progress and done <= self._phase[2]):
            self._phase = (name, now, done)
        if "rows" not in progress:
            return {}
        _, since, first = self._phase
        found: dict[str, Any] = {"row": done, "rows": int(progress.get("rows_planned", 0)) or None}
        return {**found, "row_rate": (done - first) / (now - since) if now > since else None}

    def notify(self, text: str) -> None:
        """Tell the people who watch; every later beat carries it, since beats may be passed over."""
        if text not in self._notes:
            print(text, flush=True)
            self._notes.append(text)
            self.phase(self._phase[0])

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Write a line of global metrics and keep what the driver shows."""
        named = {**values, "score": values["score_mean"]} if "score_mean" in values else values
        self._shown |= {key: named[key] for key in self._named if key in named}
        self._note_speed(values)
        if self._writer is None:
            return
        self._writer.append({"step": step, "values": dict(values)})
        self._flush()

    def _note_speed(self, values: Mapping[str, float]) -> None:
        key, amount = f"{self._progress.counted}_per_s", self._progress.counted_per_unit
        if amount is None:
            if values.get("step_s", 0.0) > 0:
                self._shown[key] = values["weight"] / values["step_s"]
        elif "iteration" in values:
            now = time.monotonic()
            if self._iteration_at is not None:
                self._shown[key] = amount / (now - self._iteration_at)
            self._iteration_at = now

    def stop_requested(self) -> bool:
        """Whether this rank was asked to save and leave."""
        is_asked = self._worker.stop_requested()
        self._flush(is_due=is_asked)
        return is_asked

    @contextmanager
    def answers_stops(self, has_unsaved: Callable[[], bool]) -> Iterator[None]:
        """While it is open the stage answers a stop; elsewhere it has nothing to save and ends at once."""
        with self._worker.answers_stops(lambda: has_unsaved() or (self._writer is not None and self._writer.has_lines)):
            yield
            self.flush()

    def flush(self) -> None:
        """Publish the lines so far."""
        self._flush(is_due=True)

    def _flush(self, *, is_due: bool = False) -> None:
        now = time.monotonic()
        is_due = is_due or now - self._flushed_at >= interval_s(FIRST_FLUSH_S, now - self._began_at)
        if self._writer is not None and is_due:
            self._writer.flush()
            self._flushed_at = now


def run_stage(job: Json, worker: WorkerContext) -> Json | None:
    """Compute a stage on this rank; rank 0 returns the candidate of its artifact and the checks that it has to pass."""
    from trainers.runtime import distributed
    from trainers.store.manifest import ArtifactManifest
    from trainers.store.store import Store
    from trainers.training.context import StageContext

    worker.beat("join")
    store = Store.open(job["store"])

    def tell(text: str) -> None:
        worker.beat("wait for the store")
        print(text, flush=True)

    store.wait_for_room(ROOM_WAIT_S, tell)
    if not store.run(job["run"]).exists():
        raise CapacityError(
            f"store {store.uri} holds no run {job['run']} as seen from {socket.gethostname()}: every node needs the "
            f"same folder there; see whether it is mounted"
        )
    store.note_datasets(job["run"], job["fingerprint"])
    recipe = parse_recipe(job["recipe"])
    spec = recipe.stages[job["stage"]]
    observer = StageObserver(worker, store, job, spec.progress(_start_family(job)), spec.shown)
    ranks = distributed.join()
    worker.beat("joined")
    base_dir = _base_dir(job, spec, store, ranks)
    inputs = {path: ArtifactManifest.model_validate(raw) for path, raw in job["inputs"].items()}
    spec, made = with_feedback_rows(spec, inputs, store)
    context = StageContext(
        store=store,
        run=job["run"],
        stage=job["stage"],
        fingerprint=job["fingerprint"],
        lease=job["lease"],
        seed=recipe.seed if spec.seed is None else spec.seed,
        base_dir=base_dir,
        inputs=inputs,
        data={path: digest for path, digest in job["data"].items() if path not in made},
        observer=observer,
        ranks=ranks,
        accepts=tuple(job.get("accepts", ())),
        replaced=tuple(job.get("replaced", ())),
        changes=tuple(job.get("changes", ())),
    )
    try:
        candidate = compute(spec, context)
    finally:
        observer.flush()
    distributed.leave()
    return (
        None
        if candidate is None
        else {"candidate": manifest_of(candidate, job), "checks": [c.to_json() for c in candidate.checks]}
    )


def _base_dir(job: Json, spec: Stage, store: "Store", ranks: "Ranks") -> Path:
    """Where the stage's data files lie; uploaded ones are fetched by one rank of each node. Collective."""
    from launch.inputs.uploaded import uploaded_folder
    from trainers.runtime import distributed

    if job["uploaded"] is None:
        return Path(job["base_dir"])
    found = uploaded_folder(store, job["uploaded"], spec) if ranks.local_rank == 0 else None
    distributed.barrier()
    if ranks.local_rank:
        found = uploaded_folder(store, job["uploaded"], spec)
    return Path(job["base_dir"]) if found is None else found


def _start_family(job: Json) -> TextFamily | None:
    """The family of the model that the stage starts from, as far as its manifest says."""
    architecture = (job["inputs"].get("init_from") or {}).get("architecture") or {}
    return MODEL_TYPES.get(architecture.get("model_type") or "")


def compute(spec: Stage, context: "StageContext") -> "Candidate | None":
    """Run the function of the stage's kind; collective, the candidate comes from rank 0."""
    match spec:
        case Reward():
            from rlhf.text.reward_stage import run_reward

            return run_reward(spec, context)
        case Preference():
            from rlhf.text.preference_stage import run_preference

            return run_preference(spec, context)
        case TextTraining():
            from trainers.tasks.language_model import run_language_model

            return run_language_model(spec, context)
        case ImageTraining():
            from trainers.tasks.images import run_image

            return run_image(spec, context)
        case RlStage():
            from rlhf.task import run_rl

            return run_rl(spec, context)
        case Feedback():
            from rlhf.text.pairs import run_feedback

            return run_feedback(spec, context)
        case Evaluate():
            from launch.runs.suites import suites_of
            from trainers.evaluation.evaluate_stage import run_evaluate

            return run_evaluate(spec, context, suites_of(spec))


def manifest_of(candidate: "Candidate", job: Json) -> Json:
    """The candidate as the manifest that will be committed, its verification left open."""
    from recipes.references import parse_reference
    from trainers.checkpoint.checkpoint import versions
    from trainers.store.manifest import FileEntry, files_digest

    spec = parse_recipe(job["recipe"]).stages[job["stage"]]
    parts = {item.field_path: getattr(parse_reference(item.text), "part", None) for item in spec.inputs()}
    parents: dict[str, Any] = {
        path: {"fingerprint": raw["fingerprint"], "digest": raw["digest"], "part": parts.get(path)}
        for path, raw in job["inputs"].items()
    }
    fields = candidate.to_json()
    files: dict[str, FileEntry] = dict(candidate.files)
    return {
        "fingerprint": job["fingerprint"],
        "digest": files_digest(files),
        "kind": fields["kind"],
        "stage": job["stage"],
        "files": fields["files"],
        "parents": parents,
        "data": job["data"],
        "contract": fields["contract"],
        "base": fields["base"],
        "stack": fields["stack"],
        "quantized": fields["quantized"],
        "architecture": fields["architecture"],
        "versions": versions(),
        "metrics": fields["metrics"],
        "gate": {"passed": not fields["gate_reasons"], "reasons": fields["gate_reasons"]},
        "outcome": dict(fields["outcome"]),
        "exactness": fields["exactness"],
        "changes": fields["changes"],
    }


def verify_candidate(job: Json, worker: WorkerContext) -> Json:
    """Open a candidate's files with stock classes in this process, which made none of them."""
    from trainers.store.manifest import ArtifactManifest
    from trainers.store.store import Store
    from trainers.training.context import Check, verify_checks

    worker.beat("verify")
    store = Store.open(job["store"])
    candidate = ArtifactManifest.model_validate(job["candidate"])
    checks = [Check.from_json(raw) for raw in job["checks"]]
    inputs = {path: ArtifactManifest.model_validate(raw) for path, raw in job["inputs"].items()}
    found = verify_checks(store, candidate.files, checks, inputs, job["store"])
    merge = {} if found.merge is None else {"merge_lost": found.merge.lost, "merge_unchanged": found.merge.unchanged}
    return {"how": "clean-process", "max_logit_difference": found.difference, **merge}
