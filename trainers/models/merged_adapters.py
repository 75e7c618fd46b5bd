"""Adapters added to weights: for files, for forwards at the cost of none, and to train on without them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from recipes.errors import StageError
from trainers.models.lora import DEFAULT, active_adapters, adapter_layers, plain_name
from trainers.models.quantised import Quantised, named_weights


def adapted_parameter(layer: Any) -> nn.Parameter:
    """Return the parameter that a layer's adapters update: a module's weight, or one of its experts' together."""
    found: nn.Parameter = getattr(layer.get_base_layer(), _leaf(layer))
    return found


def merged_name(path: str, layer: Any) -> str:
    """Return the name that this parameter of the layer at `path` has in files."""
    return f"{plain_name(path)}.{_leaf(layer)}"


@contextmanager
def folded_adapter(
    model: nn.Module, names: Sequence[str], layers: Mapping[str, Any], merged: Mapping[str, Tensor] | None = None
) -> Iterator[None]:
    """Run forwards without gradients as under some adapters, at the cost of none: their updates lie in the weights.

    In less than fp32 that rounds them. Every parameter is whole. `merged` is what `merged_tensors` gave; without it the
    weights are merged here. Afterwards the base's own tensors are put back as they were, not computed back.
    """
    own: dict[str, Tensor | None] = {}
    with torch.no_grad(), active_adapters(model, (), layers):
        for path, layer in layers.items():
            if not any(name in layer.scaling for name in names):
                continue
            if merged is None:
                tensors = {f"{path}.{key}": tensor for key, tensor in named_weights(layer).items()}
                weight = _merged_weight(layer, path, tensors, names)
            else:
                weight = merged[merged_name(path, layer)]
            own[path] = _put(layer, weight)
        try:
            yield
        finally:
            for path, before in own.items():
                _put_back(layers[path], before)


def _put(layer: Any, weight: Tensor) -> Tensor | None:
    """Let a layer's base have this weight, in its precision; returns the weight that was there, None for few bits."""
    base = layer.get_base_layer()
    if isinstance(base, Quantised):
        base.whole = weight.to(device=base.codes.device, dtype=base.dtype)
        return None
    parameter = adapted_parameter(layer)
    before, parameter.data = parameter.data, weight.to(parameter)
    return before


def _put_back(layer: Any, before: Tensor | None) -> None:
    if before is None:
        layer.get_base_layer().whole = None
    else:
        adapted_parameter(layer).data = before


def base_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Pick the base model's tensors and give them their names without adapters."""
    return {plain_name(key): tensor for key, tensor in tensors.items() if "lora_" not in key}


def merged_tensors(model: Any, tensors: Mapping[str, Tensor], names: Sequence[str] = (DEFAULT,)) -> dict[str, Tensor]:
    """Return the base's tensors with the adapters added, in fp32; the live model is not touched.

    `model` gives the shape of things; `tensors` are its whole parameters by name.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    merged = {key: tensor.float() for key, tensor in base_tensors(tensors).items()}
    for path, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer) and any(name in layer.scaling for name in names):
            merged[merged_name(path, layer)] = _merged_weight(layer, path, tensors, names)
    return merged


@torch.no_grad()
def merge_adapters(model: Any, names: Sequence[str]) -> None:
    """Add adapters to the weights, in fp32 before they are rounded to the weights' precision, and take all of them off.

    Afterwards every parameter learns, as in a model that was loaded.
    """
    tensors = dict(model.named_parameters())
    layers = adapter_layers(model)
    for path, layer in layers.items():
        parameter = adapted_parameter(layer)
        parameter.data = _merged_weight(layer, path, tensors, names).to(parameter)
    for path, layer in layers.items():
        if path == plain_name(path):  # the outermost of layers in each other
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())
    del model.peft_config
    model.requires_grad_(True)


def _merged_weight(layer: Any, path: str, tensors: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """Add updates to one layer's base weight (LoRA: W + s B A; DoRA, as the first: m * that / its row norms)."""
    prefix = f"{path}."
    if hasattr(layer, "parameter_name"):
        return _merged_experts(layer, path, tensors, names)
    is_transposed = bool(layer.fan_in_fan_out) and not hasattr(layer.base_layer, "num_embeddings")
    weight = tensors[f"{prefix}base_layer.weight"].float()
    rows = weight.T if is_transposed else weight
    for place, name in enumerate(name for name in names if name in layer.scaling):
        if f"{prefix}lora_embedding_A.{name}" in tensors:
            low, high = (tensors[f"{prefix}lora_embedding_{side}.{name}"].float() for side in "AB")
            rows = rows + (high @ low).T * float(layer.scaling[name])
            continue
        low = tensors[f"{prefix}lora_A.{name}.weight"].float()
        high = tensors[f"{prefix}lora_B.{name}.weight"].float()
        rows = rows + (high @ low) * float(layer.scaling[name])
        magnitude = tensors.get(f"{prefix}lora_magnitude_vector.{name}.weight")
        if magnitude is not None:
            if place > 0:
                raise StageError(f"{path}: a DoRA adapter on another adapter has no weights of its own to scale")
            rows = magnitude.float().view(-1, 1) * rows / rows.norm(dim=1, keepdim=True)
    return (rows.T if is_transposed else rows).contiguous()


def _merged_experts(layer: Any, path: str, tensors: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """Add updates to a parameter [E, I, O] or [E, O, I] of E experts; factors are [r E, I] and [O, E r], as peft's."""
    whole = tensors[_live_name(path, layer)].float()
    for name in (name for name in names if name in layer.scaling):
        low, high = (tensors[f"{path}.lora_{side}.{name}.weight"].float() for side in "AB")
        if whole.ndim == 2:
            update = high @ low
        else:
            by_expert = (high.reshape(len(high), -1, len(whole)), low.reshape(len(whole), -1, low.shape[1]))
            order = "ore,eri->eoi" if layer._did_swap_in_out_features else "ore,eri->eio"
            update = torch.einsum(order, *by_expert)
        whole = whole + update * float(layer.scaling[name])
    return whole.contiguous()


def _leaf(layer: Any) -> str:
    found: str = getattr(layer, "parameter_name", "weight")
    return found


def _live_name(path: str, layer: Any) -> str:
    """Return the name of the parameter that a layer's adapters update among those of the model with adapters."""
    parts, inner = [path], layer
    while hasattr(inner, "base_layer"):
        parts.append("base_layer")
        inner = inner.base_layer
    return ".".join([*parts, _leaf(layer)])
