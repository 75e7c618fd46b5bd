"""The draft of a trained model of text: probed, written whole and as an adapter, uploaded."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trainers.architectures.load import ModelKind
from trainers.architectures.lora import adapter_tensors, config_with_heads, merged_tensors
from trainers.artifacts import model_config, probe, write_adapter, write_model
from trainers.checkpoint import StoreCheckpoint
from trainers.data.tokenizer import Tokenization
from trainers.engine.protocol import Engine
from trainers.loop import Outcome
from trainers.stage import Check, Draft, StageContext, draft_folder, model_part, put_probe


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
    """Of the adapter on `init_from` that was trained; None: the whole model was."""
    heads: tuple[str, ...] = ()
    """Modules that learned whole beside the adapter and travel in its files."""
    merge: bool = True
    """Whether the model is also written with its adapter merged."""
    further_files: Mapping[str, bytes] = field(default_factory=dict)
    """What lies in the model's folder beside the tokenizer's files."""


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
    base: str | None = None
    checks: list[Check] = []
    with draft_folder() as folder:
        if trained.peft_config is not None:
            base = context.inputs["init_from"].digest
            config = config_with_heads(trained.peft_config, trained.heads)
            adapter = adapter_tensors(tensors, heads=trained.heads)
            write_adapter(folder / "adapter", config, adapter.items(), base_digest=base, dtype=dtype)
            base_part = model_part(context.inputs["init_from"], "init_from")
            checks.append(Check(kind, base_part, probe_entry, adapter="adapter", base="init_from"))
        if base is None or trained.merge:
            whole = tensors if base is None else merged_tensors(model, tensors)
            beside = {**tokenization.files(), **trained.further_files}
            write_model(folder / "model", kind, model.config, whole.items(), beside, dtype=dtype)
            checks.append(Check(kind, "model", probe_entry))
        files = context.store.objects.put_folder(folder)
    return Draft(
        kind=artifact,
        files=files,
        checks=tuple(checks),
        outcome=outcome.ending(),
        metrics=metrics,
        gate_reasons=gate_reasons,
        contract=tokenization.contract_hash,
        base=base,
        architecture=model_config(model.config, kind, dtype),
        exactness=checkpoint.exactness,
        changes=tuple(checkpoint.made_changes),
    )
