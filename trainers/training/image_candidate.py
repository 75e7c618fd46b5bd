"""The candidate of a trained model of images: probed, written with its adapter where it has one, uploaded."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trainers.checkpoint.checkpoint import StoreCheckpoint
from trainers.models.folders import write_adapter
from trainers.models.images.build import Blueprint, probe_adapter, probe_family, write_family
from trainers.training.context import Candidate, Check, StageContext, candidate_folder, put_probe
from trainers.training.outcome import Outcome


def write_image_candidate(
    blueprint: Blueprint,
    weights: Mapping[str, Tensor],
    context: StageContext,
    checkpoint: StoreCheckpoint,
    outcome: Outcome,
    *,
    dtype: torch.dtype,
    metrics: Mapping[str, Any],
    gate_reasons: tuple[str, ...],
    peft_config: Any = None,
    adapter: Mapping[str, Tensor] | None = None,
    base_input: str = "init_from",
) -> Candidate | None:
    """Write, probe and upload a model; returns the candidate on rank 0, None elsewhere.

    `weights` are whole, by their names in the family's module; `adapter` is what they hold beyond the model of the
    input `base_input`.
    """
    if context.ranks.rank != 0:
        return None
    base: str | None = None
    family = blueprint.with_weights(weights, dtype)
    probe = put_probe(context.store, probe_family(family, dtype))
    checks = [Check("image", "model", probe)]
    with candidate_folder() as folder:
        if adapter is not None:
            base = context.inputs[base_input].digest
            write_adapter(folder / "adapter", peft_config, adapter.items(), base_digest=base, dtype=dtype)
            own = put_probe(context.store, probe_adapter(adapter, dtype))
            checks.append(Check("image", "model", own, adapter="adapter", base=base_input, merged="model"))
        write_family(folder / "model", family, blueprint, weights, dtype)
        files = context.store.objects.put_folder(folder)
    return Candidate(
        kind=blueprint.architecture.kind(),
        files=files,
        checks=tuple(checks),
        base=base,
        outcome=outcome.ending(),
        metrics=metrics,
        gate_reasons=gate_reasons,
        architecture={**blueprint.architecture.model_dump(mode="json"), "classes": list(blueprint.facts.classes)},
        exactness=checkpoint.exactness,
        changes=tuple(checkpoint.made_changes),
    )
