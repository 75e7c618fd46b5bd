"""Models opened with the adapters that they learned: beside the weights, or in them where fp32 keeps them whole."""

from typing import Any

import torch

from trainers.models.forward_forms import record_of
from trainers.models.load import load_model
from trainers.models.lora import activate, put_adapter, start_names
from trainers.models.merged_adapters import merge_adapters
from trainers.models.protocol import ModelKind
from trainers.models.saved_modules import put_saved
from trainers.store.adapters import Weights

BRINGS_HEAD = ("score_model", "value_model", "text_classifier")
"""Kinds whose adapter has a head beside it."""


def load_stack(
    weights: Weights,
    kind: ModelKind,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    new_head_seed: int | None = None,
    **options: Any,
) -> Any:
    """Load a model as `load_model` does, frozen, its adapters on and not merged; without adapters it learns whole.

    A head that the last adapter brings is its own.
    """
    if not weights.adapters:
        return load_model(weights.folder, kind, device=device, dtype=dtype, new_head_seed=new_head_seed, **options)
    if new_head_seed is None and kind in BRINGS_HEAD:
        new_head_seed = 0  # the adapter brings the head that takes its place
    places: dict[str, Any] = {"device": device, "dtype": dtype, "rounded_to": getattr(torch, weights.dtype)}
    model: Any = load_model(weights.folder, kind, new_head_seed=new_head_seed, **places, **options)
    names = start_names(len(weights.adapters))
    for folder, name in zip(weights.adapters, names, strict=True):
        saved = put_adapter(model, folder, name)
        if kind in BRINGS_HEAD:  # the head that predicts tokens has made room for its own
            output = f"{record_of(model).output}."
            saved = {key: tensor for key, tensor in saved.items() if not key.startswith(output)}
        put_saved(model, saved)
    activate(model, names)
    return model


def load_exact(
    weights: Weights, kind: ModelKind, *, device: torch.device, dtype: torch.dtype = torch.float32, **options: Any
) -> Any:
    """Load a model for forwards, or for training it whole in fp32: its adapters are merged where fp32 keeps them."""
    model = load_stack(weights, kind, device=device, dtype=dtype, **options)
    if weights.adapters and dtype == torch.float32:
        merge_adapters(model, start_names(len(weights.adapters)))
    return model
