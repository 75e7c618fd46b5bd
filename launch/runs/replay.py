"""An iteration of a stage that a run has computed, once more in this process: where its parts come from."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

from launch.records.record import RunRecord, origin_of
from recipes.errors import RequestError

if TYPE_CHECKING:
    from launch.inputs.resolved import Resolved
    from recipes.stages.rl import RlText
    from rlhf.text.replay import Replay
    from trainers.store.manifest import ArtifactManifest
    from trainers.store.store import Store
    from trainers.training.context import StageContext


class ReplayObserver:
    """The observer of a replay: metrics are dropped, since the run has them, and it is never stopped."""

    def phase(self, name: str, **progress: float) -> None:
        """Not shown."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Not kept: the run has them."""

    def notify(self, text: str) -> None:
        """Print it."""
        print(text, flush=True)

    def stop_requested(self) -> bool:
        """Return False."""
        return False

    @contextmanager
    def answers_stops(self, has_unsaved: Callable[[], bool]) -> Iterator[None]:
        """There is nothing to save."""
        yield


def replay_stage(store: "Store", place: str, iteration: int) -> "Replay":
    """Recompute an iteration of RUN/STAGE; raises RequestError for what is no such stage or was not kept."""
    from rlhf.text.replay import replay

    return replay(*recorded_stage(store, place), iteration)


def recorded_stage(store: "Store", place: str) -> "tuple[RlText, StageContext]":
    """The stage of RUN/STAGE that keeps samples, and where it ran; raises RequestError for what is no such stage."""
    from trainers.runtime import distributed
    from trainers.training.context import StageContext

    run, _, stage = place.partition("/")
    record = RunRecord.open(store, run)
    plan = {entry["name"]: str(entry["fingerprint"]) for entry in record.raw["plan"]}
    spec = record.resolved().recipe.stages.get(stage)
    if spec is None or not spec.keeps_samples:
        found = f"{record.run} has no stage {stage!r}" if spec is None else f"{stage} keeps no samples"
        raise RequestError(
            f"{found}; give RUN/STAGE of a stage of kind rl that samples a language model (rollout.keep)"
        )
    spec = cast("RlText", spec)
    if not store.list_rollouts(record.run, stage):
        record = origin_of(store, plan[stage], record.run) or record
    resolved = record.resolved()
    return spec, StageContext(
        store=store,
        run=record.run,
        stage=stage,
        fingerprint=plan[stage],
        lease=0,
        seed=resolved.recipe.seed if spec.seed is None else spec.seed,
        base_dir=_base_dir(store, resolved, spec),
        inputs=_inputs(store, resolved, stage, plan),
        data=resolved.data.get(stage, {}),
        observer=ReplayObserver(),
        ranks=distributed.join(),
    )


def _base_dir(store: "Store", resolved: "Resolved", spec: "RlText") -> Path:
    from launch.inputs.uploaded import uploaded_folder

    found = None if resolved.uploaded is None else uploaded_folder(store, resolved.uploaded, spec)
    return found or resolved.base_dir


def _inputs(store: "Store", resolved: "Resolved", stage: str, plan: Mapping[str, str]) -> dict[str, "ArtifactManifest"]:
    """What the stage's inputs were, by field path."""
    found = dict(resolved.external.get(stage, {}))
    for field_path, reference in resolved.internal.get(stage, {}).items():
        found[field_path] = store.resolve(plan[reference.stage])
    return found
