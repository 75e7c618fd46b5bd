"""Models opened with the adapters that they learned: beside the weights, or in them where fp32 keeps them whole."""

from typing import Any

import torch

from recipes.models.model_kinds import MODEL_KINDS, ModelKind
from recipes.stages.lora import Lora
from recipes.stages.sharding import Shard
from trainers.models.forward_forms import record_of
from trainers.models.load import load_model
from trainers.models.lora import activate, put_adapter, start_names
from trainers.models.merged_adapters import merge_adapters
from trainers.models.quantised import quantise_base, round_base
from trainers.models.saved_modules import put_saved
from trainers.runtime.precision import dtype_of
from trainers.store.adapters import Weights


def load_stack(
    weights: Weights,
    kind: ModelKind,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    new_head_seed: int | None = None,
    held_in: torch.dtype | None = None,
    **options: Any,
) -> Any:
    """Load a model as `load_model` does, frozen, its adapters on and not merged; without adapters it learns whole.

    A head that the last adapter brings is its own. A base that is `quantized` is rounded to these bits, and kept in
    them where `held_in` is the precision that the model will work in.
    """
    if not weights.adapters:
        found = load_model(weights.folder, kind, device=device, dtype=dtype, new_head_seed=new_head_seed, **options)
        _round(found, weights, held_in or dtype, is_held=held_in is not None)
        return found
    if new_head_seed is None and not MODEL_KINDS[kind].predicts_tokens:
        new_head_seed = 0  # the adapter brings the head that takes its place
    places: dict[str, Any] = {"device": device, "dtype": dtype, "rounded_to": getattr(torch, weights.dtype)}
    model: Any = load_model(weights.folder, kind, new_head_seed=new_head_seed, **places, **options)
    _round(model, weights, places["rounded_to"], is_held=held_in is not None)
    names = start_names(len(weights.adapters))
    for folder, name in zip(weights.adapters, names, strict=True):
        saved = put_adapter(model, folder, name)
        if not MODEL_KINDS[kind].predicts_tokens:  # the head that predicts tokens has made room for its own
            output = f"{record_of(model).output}."
            saved = {key: tensor for key, tensor in saved.items() if not key.startswith(output)}
        put_saved(model, saved)
    activate(model, names)
    return model


def _round(model: Any, weights: Weights, dtype: torch.dtype, *, is_held: bool) -> None:
    if weights.quantized is not None:
        (quantise_base if is_held else round_base)(model, weights.quantized, dtype)


def load_exact(
    weights: Weights, kind: ModelKind, *, device: torch.device, dtype: torch.dtype = torch.float32, **options: Any
) -> Any:
    """Load a model for forwards, or for training it whole in fp32: its adapters are merged where fp32 keeps them."""
    model = load_stack(weights, kind, device=device, dtype=dtype, **options)
    if weights.adapters and dtype == torch.float32:
        merge_adapters(model, start_names(len(weights.adapters)))
    return model


def load_trained(weights: Weights, kind: ModelKind, lora: Lora | None, shard: Shard, **options: Any) -> Any:
    """Load what a stage trains: whole, its adapters merged, or as the frozen base of another adapter."""
    if lora is None:
        return load_exact(weights, kind, **options)
    return load_stack(weights, kind, held_in=dtype_of(shard.precision) if lora.quantize else None, **options)
