"""The draft of a trained model of text: probed, written whole and as an adapter, uploaded."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainers.architectures.load import ModelKind
from trainers.architectures.lora import DEFAULT, adapter_tensors, config_with_heads, merged_tensors
from trainers.artifacts import model_config, probe, write_adapter, write_model
from trainers.checkpoint import StoreCheckpoint
from trainers.data.tokenizer import Tokenization
from trainers.engine.protocol import Engine
from trainers.loop import Outcome
from trainers.stage import Check, Draft, StageContext, draft_folder, model_part, put_probe
from trainers.store.manifest import FileEntry


@dataclass(frozen=True)
class TrainedText:
    """A live model of text under an engine, with what its files need beside its weights; equal on all ranks."""

    kind: ModelKind
    model: Any
    prefix: str
    """What the model's parameter names start with in the engine's module."""
    tokenization: Tokenization
    dtype: torch.dtype
    peft_config: Any = None
    """Of the adapter on the start that was trained; None: the whole model was."""
    heads: tuple[str, ...] = ()
    """Modules that learned whole beside the adapter and travel in its files."""
    merge: bool = True
    """Whether the model is also written with its adapter merged."""
    further_files: Mapping[str, bytes] = field(default_factory=dict)
    """What lies in the model's folder beside the tokenizer's files."""
    start: str = "init_from"
    """Field path of the model that it started from."""
    part: str = "model"
    """Folder of the whole model in the artifact."""
    adapter: str = DEFAULT
    """Name of the adapter in the model."""

    def base(self, context: StageContext) -> str | None:
        """Return the digest of what the adapter belongs to; None: there is no adapter."""
        return None if self.peft_config is None else context.inputs[self.start].digest


def write_text_draft(
    trained: TrainedText,
    context: StageContext,
    engine: Engine,
    checkpoint: StoreCheckpoint,
    outcome: Outcome,
    *,
    artifact: str,
    metrics: Mapping[str, Any],
    gate_reasons: tuple[str, ...],
) -> Draft | None:
    """Write, probe and upload what the stage made, `artifact` its kind; the draft comes from rank 0. Collective."""
    kind, model, tokenization, dtype = trained.kind, trained.model, trained.tokenization, trained.dtype
    is_first = context.ranks.rank == 0
    with engine.gathered():
        found = probe(model, kind, tokenization.vocab_size) if is_first else None
    tensors: dict[str, Tensor] = {}
    for name, tensor in engine.full_parameters():
        if is_first:
            tensors[name.removeprefix(trained.prefix)] = tensor
    if found is None:
        return None
    probe_entry = put_probe(context.store, found)
    with draft_folder() as folder:
        checks = write_trained(folder, trained, tensors, context, probe_entry)
        files = context.store.objects.put_folder(folder)
    return Draft(
        kind=artifact,
        files=files,
        checks=tuple(checks),
        outcome=outcome.ending(),
        metrics=metrics,
        gate_reasons=gate_reasons,
        contract=tokenization.contract_hash,
        base=trained.base(context),
        architecture=model_config(model.config, kind, dtype),
        exactness=checkpoint.exactness,
        changes=tuple(checkpoint.made_changes),
    )


def write_trained(
    folder: Path, trained: TrainedText, tensors: Mapping[str, Tensor], context: StageContext, probe_entry: FileEntry
) -> list[Check]:
    """Write a model's adapter, and the model whole where there is none or it is merged; returns how to verify them.

    `tensors` are its parameters by its own names, whole.
    """
    kind, model, dtype = trained.kind, trained.model, trained.dtype
    base, checks = trained.base(context), []
    if base is not None:
        config = config_with_heads(trained.peft_config, trained.heads)
        adapter = adapter_tensors(tensors, trained.adapter, heads=trained.heads)
        write_adapter(folder / "adapter", config, adapter.items(), base_digest=base, dtype=dtype)
        base_part = model_part(context.inputs[trained.start], trained.start)
        checks.append(Check(kind, base_part, probe_entry, adapter="adapter", base=trained.start))
    if base is None or trained.merge:
        whole = tensors if base is None else merged_tensors(model, tensors, trained.adapter)
        beside = {**trained.tokenization.files(), **trained.further_files}
        write_model(folder / trained.part, kind, model.config, whole.items(), beside, dtype=dtype)
        checks.append(Check(kind, trained.part, probe_entry))
    return checks
