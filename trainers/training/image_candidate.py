"""The candidate of a trained model of images: probed, written with its adapter where it has one, uploaded."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainers.checkpoint.checkpoint import StoreCheckpoint
from trainers.models.folders import write_adapter
from trainers.models.images.build import Blueprint, probe_adapter, probe_family, write_family
from trainers.training.candidate import upload_candidate
from trainers.training.context import Candidate, Check, StageContext, put_probe
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
    base = None if adapter is None else context.inputs[base_input].digest

    def write(folder: Path) -> list[Check]:
        family = blueprint.with_weights(weights, dtype)
        checks = [Check("image", "model", put_probe(context.store, probe_family(family, dtype)))]
        if adapter is not None and base is not None:
            write_adapter(folder / "adapter", peft_config, adapter.items(), base_digest=base, dtype=dtype)
            own = put_probe(context.store, probe_adapter(adapter, dtype))
            checks.append(Check("image", "model", own, adapter="adapter", base=base_input, merged="model"))
        write_family(folder / "model", family, blueprint, weights, dtype)
        return checks

    return upload_candidate(
        blueprint.architecture.kind(),
        write,
        context,
        checkpoint,
        outcome,
        metrics=metrics,
        gate_reasons=gate_reasons,
        architecture={**blueprint.architecture.model_dump(mode="json"), "classes": list(blueprint.facts.classes)},
        base=base,
    )
