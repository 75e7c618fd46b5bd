"""Small stages run whole by ranks: to their candidates and verification, or to a preemption."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.runs.stage_entry import compute
from recipes.errors import Preempted
from recipes.loading.load import parse_recipe
from recipes.planning.settle import Hardware, settle_shards
from tests.observers import Quiet
from trainers.runtime import distributed
from trainers.store.manifest import ArtifactManifest, files_digest
from trainers.store.store import Store
from trainers.training.context import Candidate, StageContext, verify_checks

CURVES = ("loss", "generator_loss", "eval/loss", "score_mean", "kl", "pseudo_share")


@dataclass(frozen=True)
class Case:
    """One stage under the name of a run; runs of one name go on from each other's state."""

    run: str
    stage: str
    spec: dict[str, Any]
    """The stage as a recipe has it."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Names of stages that ran before, by field path."""
    stop_at: int = 0
    """The last rank is asked to stop from this step on; 0: never."""
    is_kept: bool = False
    """Whether the artifact gets the stage's name in the store."""


class Observer(Quiet):
    """Asks to stop at a step and remembers what it heard."""

    def __init__(self, stop_at: int) -> None:
        self.stop_at = stop_at
        self.step = 0
        self.steps: list[int] = []
        self.curves: dict[str, dict[int, float]] = {name: {} for name in CURVES}

    def phase(self, name: str, **progress: float) -> None:
        self.step = int(progress.get("step", 0))

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        if "loss" in values:
            self.steps.append(step)
        for name, curve in self.curves.items():
            if name in values:
                curve[step] = values[name]

    def stop_requested(self) -> bool:
        return 0 < self.stop_at <= self.step and distributed.rank() == distributed.world_size() - 1


@dataclass(frozen=True)
class Made:
    """What came out of a stage, on rank 0."""

    candidate: Candidate
    digest: str
    inputs: dict[str, ArtifactManifest]


def run_stage(
    folder: Path,
    ranks: distributed.Ranks,
    observer: Any,
    *,
    run: str,
    stage: str,
    spec: Mapping[str, Any],
    inputs: Mapping[str, str],
    fingerprint: str,
    name_as: str | None = None,
) -> Made | None:
    """Run a stage in FOLDER/store under a lease of its own; inputs are names there, `name_as` the artifact's."""
    store = Store.open(str(folder / "store"))
    lease = int(distributed.broadcast_json(store.take_lease(run, stage) if ranks.rank == 0 else None))
    given = {path: store.resolve(name) for path, name in inputs.items()}
    context = StageContext(store, run, stage, fingerprint, lease, 0, folder, given, {}, observer, ranks)
    recipe = parse_recipe({"name": "small", "stages": {stage: dict(spec)}})
    # Without facts of any hardware: fp32, and as many bits everywhere.
    settled = settle_shards(recipe, Hardware(), ranks.world_size, lambda _: {}).recipe
    candidate = compute(settled.stages[stage], context)
    if candidate is None:
        return None
    manifest = ArtifactManifest(
        fingerprint=fingerprint, digest=files_digest(candidate.files), kind=candidate.kind, stage=stage,
        files=dict(candidate.files), base=candidate.base, stack=list(candidate.stack), contract=candidate.contract,
        metrics=dict(candidate.metrics), outcome=dict(candidate.outcome), architecture=candidate.architecture,
    )  # fmt: skip
    if name_as is not None:
        store.put_artifact(manifest)
        store.name_artifact(name_as, fingerprint)
    return Made(candidate, manifest.digest, given)


def run_case(folder: Path, ranks: distributed.Ranks, case: Case) -> None:
    """Run one stage to its end or to a preemption."""
    run, stage = case.run, case.stage
    observer = Observer(case.stop_at)
    try:
        made = run_stage(
            folder, ranks, observer, run=run, stage=stage, spec=case.spec, inputs=case.inputs,
            fingerprint=hashlib.sha256(stage.encode()).hexdigest(), name_as=stage if case.is_kept else None,
        )  # fmt: skip
    except Preempted:
        assert case.stop_at
        return
    assert not case.stop_at
    if made is None:
        return
    uri, candidate = str(folder / "store"), made.candidate
    store = Store.open(uri)
    result = {
        **candidate.to_json(),
        "difference": verify_checks(store, candidate.files, list(candidate.checks), made.inputs, uri).difference,
        "digest": made.digest,
        "steps": observer.steps,
        "curves": observer.curves,
        "grids": [line for line in store.run(run).read_lines(f"samples/{stage}") if "image" in line],
    }
    (folder / f"{run}-{stage}.json").write_text(json.dumps(result))


def run_cases(folder: Path, cases: Sequence[Case]) -> None:
    """Run cases in turn on this rank; rank 0 writes FOLDER/<run>-<stage>.json for each that reaches its end."""
    ranks = distributed.join()
    for case in cases:
        try:
            run_case(folder, ranks, case)
        except Exception as error:
            error.add_note(f"in {case.run}-{case.stage}")
            raise
        distributed.barrier()
    distributed.leave()
