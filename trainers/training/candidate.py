"""The candidate of a trained model: its files are written and uploaded, whatever family it is of."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes.artifact_kinds import ArtifactKind
from trainers.checkpoint.checkpoint import StoreCheckpoint
from trainers.runtime.low_bits import Method
from trainers.training.context import Candidate, Check, StageContext, candidate_folder
from trainers.training.outcome import Outcome

WriteFiles = Callable[[Path], Sequence[Check]]
"""Writes a model's files into a folder and returns how to verify them."""


def upload_candidate(
    kind: ArtifactKind,
    write: WriteFiles,
    context: StageContext,
    checkpoint: StoreCheckpoint,
    outcome: Outcome,
    *,
    metrics: Mapping[str, Any],
    gate_reasons: tuple[str, ...],
    architecture: Mapping[str, Any],
    contract: str | None = None,
    base: str | None = None,
    stack: tuple[str, ...] = (),
    quantized: Method | None = None,
) -> Candidate:
    """Write and upload what a stage made, `kind` its artifact's; rank 0 only. Keywords are the candidate's fields."""
    with candidate_folder() as folder:
        checks = write(folder)
        files = context.store.objects.put_folder(folder)
    return Candidate(
        kind=kind,
        files=files,
        checks=tuple(checks),
        outcome=outcome.ending(),
        metrics=metrics,
        gate_reasons=gate_reasons,
        contract=contract,
        base=base,
        stack=stack,
        quantized=quantized,
        architecture=architecture,
        exactness=checkpoint.exactness,
        changes=tuple(checkpoint.made_changes),
    )
