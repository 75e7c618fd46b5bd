"""One rank that runs small stages whole: to their drafts and verification, or to a preemption.

Usage: python stage_worker.py FOLDER CASES; CASES is a JSON list of `Case`'s fields. Rank 0 writes
FOLDER/<run>-<stage>.json for each case that reaches its end, FOLDER/<run>-<stage>.error where it raises.
"""

import hashlib
import json
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.stages import compute
from recipes.errors import Preempted
from recipes.load import parse_recipe
from trainers import distributed
from trainers.stage import StageContext, verify_checks
from trainers.store.manifest import ArtifactManifest, files_digest
from trainers.store.store import Store

CURVES = ("loss", "generator_loss", "eval/loss", "score_mean", "kl")


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


class Observer:
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


def run_case(folder: Path, ranks: distributed.Ranks, case: Case) -> None:
    """Run one stage to its end or to a preemption."""
    run, stage = case.run, case.stage
    uri = str(folder / "store")
    store = Store.open(uri)
    lease = int(distributed.broadcast_json(store.take_lease(run, stage) if ranks.rank == 0 else None))
    inputs = {path: store.resolve(name) for path, name in case.inputs.items()}
    observer = Observer(case.stop_at)
    fingerprint = hashlib.sha256(stage.encode()).hexdigest()
    context = StageContext(store, run, stage, fingerprint, lease, 0, folder, inputs, {}, observer, ranks)
    try:
        draft = compute(parse_recipe({"name": "small", "stages": {stage: case.spec}}).stages[stage], context)
    except Preempted:
        assert case.stop_at
        return
    assert not case.stop_at
    if draft is None:
        return
    manifest = ArtifactManifest(
        fingerprint=fingerprint,
        digest=files_digest(draft.files),
        kind=draft.kind,  # type: ignore[arg-type]
        stage=stage,
        files=dict(draft.files),
        base=draft.base,
        outcome=dict(draft.outcome),  # type: ignore[arg-type]
    )
    if case.is_kept:
        store.put_artifact(manifest)
        store.name_artifact(stage, fingerprint)
    result = {
        **draft.to_json(),
        "difference": verify_checks(store, draft.files, list(draft.checks), inputs, uri),
        "digest": manifest.digest,
        "steps": observer.steps,
        "curves": observer.curves,
        "grids": [line for line in store.run(run).read_lines(f"samples/{stage}") if "image" in line],
    }
    (folder / f"{run}-{stage}.json").write_text(json.dumps(result))


def main() -> None:
    """Run the cases in turn; a failed one is reported and ends this rank."""
    folder, cases = Path(sys.argv[1]), [Case(**case) for case in json.loads(sys.argv[2])]
    ranks = distributed.join()
    for case in cases:
        try:
            run_case(folder, ranks, case)
        except Exception:
            (folder / f"{case.run}-{case.stage}.error").write_text(traceback.format_exc())
            raise
        distributed.barrier()
    distributed.leave()


if __name__ == "__main__":
    main()
