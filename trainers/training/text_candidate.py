"""The candidate of a trained model of text: probed, written whole and as an adapter, uploaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recipes.artifact_kinds import ArtifactKind
from recipes.models.model_kinds import ModelKind
from trainers.checkpoint.checkpoint import StoreCheckpoint
from trainers.data.image_processor import ImageProcessor
from trainers.data.tokenizer import Tokenization
from trainers.engine.protocol import Engine
from trainers.models.folders import file_tensors, model_config, probe, write_adapter, write_model
from trainers.models.lora import (
    DEFAULT,
    active_adapters,
    adapter_layers,
    adapter_tensors,
    config_with_heads,
    start_names,
)
from trainers.models.merged_adapters import base_tensors, folded_adapter, merged_tensors
from trainers.models.quantised import base_rounding, named_weights, quantised_weights
from trainers.models.saved_modules import saved_paths, tied_names
from trainers.models.verification import Probe
from trainers.models.weight_starts import ORIGIN, doubled, has_origin, with_origin
from trainers.runtime.low_bits import Method
from trainers.store.adapters import whole_part
from trainers.training.candidate import upload_candidate
from trainers.training.context import Candidate, Check, StageContext, put_probe
from trainers.training.outcome import Outcome


@dataclass(frozen=True)
class Probes:
    """What the live model gives: with its adapter on the base, and as the whole model that is written."""

    adapter: Probe | None = None
    whole: Probe | None = None


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
    images: ImageProcessor | None = None
    """Of a vision-language model; its files lie beside the tokenizer's."""
    start: str = "init_from"
    """Field path of the model that it started from."""
    part: str = "model"
    """Folder of the whole model in the artifact."""
    adapter: str = DEFAULT
    """Name of the adapter in the model."""
    stack: tuple[str, ...] = ()
    """What the model was opened from, by digest: its start, or a whole model and the adapters on it up to the start."""
    continues: bool = False
    """Whether the start's own adapter has learned on, which is not in the stack."""

    @property
    def below(self) -> tuple[str, ...]:
        """Names of the adapters that were there before, the lowest first."""
        return start_names(len(self.stack) - 1)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of all adapters, the lowest first."""
        return (*self.below, *((ORIGIN,) if has_origin(self.model) else ()), self.adapter)

    @property
    def learning_modules(self) -> tuple[str, ...]:
        """Paths of the modules that learned whole beside the adapter, and of those that are tied to them."""
        return (*self.heads, *saved_paths(self.model, self.peft_config.modules_to_save or ()))

    def adapter_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Pick what the adapter's files hold of the model's tensors, by the names there."""
        heads, tied = self.learning_modules, tied_names(self.model)
        own = adapter_tensors(tensors, self.adapter, heads=heads, tied=tied)
        return with_origin(own, adapter_tensors(tensors, ORIGIN)) if has_origin(self.model) else own

    def whole_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the whole model's tensors by their names in files, adapters merged in fp32; {} if not."""
        if self.peft_config is None:
            return dict(tensors)
        return merged_tensors(self.model, tensors, self.adapters) if self.merge else {}

    def probes(self, whole: Mapping[str, Tensor]) -> "Probes":
        """Probe the live model, every parameter in place; `whole` is what `whole_tensors` gave."""
        model, images = self.model, self.images
        if self.peft_config is None:
            return Probes(whole=probe(model, self.kind, model.named_parameters(), images))
        layers = adapter_layers(model)
        with active_adapters(model, self.adapters, layers):
            named = named_weights(model)
            own = self.adapter_tensors(named)
            heads = tuple(f"{path}." for path in self.learning_modules)
            base = {name: tensor for name, tensor in base_tensors(named).items() if not name.startswith(heads)}
            under = {
                f"{name}: {key}": tensor for name in self.below for key, tensor in adapter_tensors(named, name).items()
            }
            adapted = probe(model, self.kind, {**base, **under, **own}.items(), images)
        if not self.merge:
            return Probes(adapter=adapted)
        with folded_adapter(model, self.adapters, layers, whole):
            merged = probe(model, self.kind, base_tensors(named_weights(model)).items(), images)
        return Probes(adapter=adapted, whole=merged)

    def base(self, context: StageContext) -> str | None:
        """Return the digest of what the adapter belongs to; None: there is no adapter."""
        if self.peft_config is None:
            return None
        return self.stack[-1] if self.continues else context.inputs[self.start].digest

    @property
    def quantized(self) -> Method | None:
        """Return into which bits the base of the adapter was rounded."""
        return None if self.peft_config is None else base_rounding(self.model)

    @property
    def lower_stack(self) -> tuple[str, ...]:
        """What the adapter lies on, by digest, where that is not the start's whole model."""
        return self.stack if self.peft_config is not None and (len(self.stack) > 1 or self.continues) else ()


def write_text_candidate(
    trained: TrainedText,
    context: StageContext,
    engine: Engine,
    checkpoint: StoreCheckpoint,
    outcome: Outcome,
    *,
    artifact: ArtifactKind,
    metrics: Mapping[str, Any],
) -> Candidate | None:
    """Write, probe and upload what the stage made, `artifact` its kind; the candidate comes from rank 0. Collective."""
    kind, model, tokenization, dtype = trained.kind, trained.model, trained.tokenization, trained.dtype
    tensors: dict[str, Tensor] = {}
    for name, tensor in engine.full_parameters():
        if context.ranks.rank == 0:
            tensors[name.removeprefix(trained.prefix)] = tensor
    if context.ranks.rank == 0:
        tensors |= quantised_weights(model)
    whole = trained.whole_tensors(tensors) if context.ranks.rank == 0 else {}
    with engine.gathered():
        probes = trained.probes(whole) if context.ranks.rank == 0 else None
    if probes is None:
        return None
    found = probes
    return upload_candidate(
        artifact,
        lambda folder: write_trained(folder, trained, tensors, whole, context, found),
        context,
        checkpoint,
        outcome,
        metrics=metrics,
        gate_reasons=outcome.evaluation.gate_reasons,
        architecture=model_config(model.config, kind, dtype),
        contract=tokenization.contract_hash,
        base=trained.base(context),
        stack=trained.lower_stack,
        quantized=trained.quantized,
    )


def write_trained(
    folder: Path,
    trained: TrainedText,
    tensors: Mapping[str, Tensor],
    whole: Mapping[str, Tensor],
    context: StageContext,
    probes: Probes,
) -> list[Check]:
    """Write a model's adapter, and the model whole where there is none or it is merged; returns how to verify them.

    `tensors` are its parameters by its own names; `whole` what `whole_tensors` made of them.
    """
    kind, dtype, base = trained.kind, trained.dtype, trained.base(context)
    checks = []
    if base is not None and probes.adapter is not None:
        config = config_with_heads(trained.peft_config, trained.heads)
        config = doubled(config) if has_origin(trained.model) else config
        adapter = trained.adapter_tensors(tensors)
        write_adapter(folder / "adapter", config, adapter.items(), base_digest=base, dtype=dtype)
        checks.append(
            Check(
                kind,
                whole_part(context.inputs[trained.start]),
                put_probe(context.store, probes.adapter),
                adapter="adapter",
                base=trained.start,
                merged=trained.part if trained.merge else None,
                stack=trained.lower_stack,
                quantized=trained.quantized,
            )
        )
    if probes.whole is not None:
        beside = {**trained.tokenization.files(), **({} if trained.images is None else trained.images.files)}
        config, ends = trained.model.config, trained.tokenization.end_ids
        held = file_tensors(trained.model, whole)
        write_model(folder / trained.part, kind, config, held.items(), beside, dtype=dtype, end_ids=ends)
        checks.append(Check(kind, trained.part, put_probe(context.store, probes.whole)))
    return checks
