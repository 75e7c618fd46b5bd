"""Low-rank adapters by peft, put into a model in place, several on one frozen base.

peft's own switches flip `requires_grad`, which sharded engines do not survive; the switches here leave it alone.
"""

import copy
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from recipes.errors import StageError, raise_findings
from recipes.stages.lora import Lora
from trainers.models.forward_forms import record_of
from trainers.store.hf_loaders import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from trainers.store.untrusted_files import linked_file, read_json

DEFAULT = "default"
_IN_FILES = "base_model.model."
"""Prefix of all names in peft's files."""


def add_adapter(
    model: Any,
    lora: Lora,
    *,
    seed: int,
    name: str = DEFAULT,
    exclude: Sequence[str] | str = (),
    targets: Sequence[str] | None = None,
    heads: Sequence[str] = (),
    on: Sequence[str] = (),
) -> Any:
    """Add an adapter whose weights depend on the seed alone; returns peft's configuration.

    Freezes the base; adapters that are there stay trainable, and all adapters stay in the order of their addition. From
    then on forwards run with it over the adapters `on`.
    Modules whose path ends in one of `exclude`, or matches it where it is a pattern, get none. `targets` are those of a
    model that is no language model. The modules `heads` learn whole beside the adapter.
    """
    from peft import LoraConfig

    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=target_names(model, lora, exclude) if targets is None else list(targets),
        exclude_modules=(exclude if isinstance(exclude, str) else list(exclude)) or None,
        use_dora=lora.dora,
        use_rslora=lora.rank_stabilised,
        task_type=_task_type(model) if targets is None else None,
        fan_in_fan_out=_is_transposed(model),
    )
    _inject(model, config, name, seed)
    activate(model, (*on, name))
    for head in heads:
        model.get_submodule(head).requires_grad_(True)
    return config


@torch.no_grad()
def put_adapter(model: Any, folder: Path, name: str) -> dict[str, Tensor]:
    """Add a saved adapter, frozen and without its dropout; returns the tensors of modules that learned beside it.

    Raises StageError unless the folder's file holds exactly the adapter's tensors.
    """
    from peft import LoraConfig

    content = read_json(folder, ADAPTER_CONFIG, linked_file)
    fields = (
        "r", "lora_alpha", "target_modules", "exclude_modules", "use_dora", "use_rslora", "fan_in_fan_out",
        "rank_pattern", "alpha_pattern",
    )  # fmt: skip
    _inject(model, LoraConfig(**{key: content[key] for key in fields if key in content}), name, 0)
    saved = load_file(folder / ADAPTER_WEIGHTS)
    heads = {key.removeprefix(_IN_FILES): saved.pop(key) for key in list(saved) if "lora_" not in key}
    own = adapter_tensors(dict(model.named_parameters()), name)
    if own.keys() != saved.keys():
        raise StageError(f"{folder}: keys differ from the adapter's: {sorted(own.keys() ^ saved.keys())[:8]}")
    for key, parameter in own.items():
        parameter.copy_(saved[key])
        parameter.requires_grad_(False)
    return heads


def _inject(model: Any, config: Any, name: str, seed: int) -> None:
    """Add an adapter that learns; of the others those learn that did, and of the base nothing."""
    from peft import inject_adapter_in_model

    learning = {key for key, parameter in model.named_parameters() if parameter.requires_grad and "lora_" in key}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed)
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        # Written by peft itself for experts that transformers fuses, whether or not the model has such.
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
        inject_adapter_in_model(config, model, adapter_name=name)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(key in learning or is_adapter_key(key, name))


def start_names(count: int) -> tuple[str, ...]:
    """Return the names of as many adapters that a model starts with, the lowest first."""
    return tuple(f"start{number}" for number in range(1, count + 1))


def is_adapter_key(key: str, name: str = DEFAULT) -> bool:
    """Tell whether a parameter belongs to the adapter of that name."""
    parts = key.split(".")
    return any(part.startswith("lora_") for part in parts) and name in parts


def target_names(model: Any, lora: Lora, exclude: Sequence[str] | str = ()) -> list[str]:
    """Return the names of the linear modules that get an adapter; raises RequestError for a name that is not there.

    Where `exclude` is a pattern, modules that match it have no name here. The head has none either; it lies in the base
    of an encoder-decoder.
    """
    head = model.get_output_embeddings()
    linear = [
        key
        for key, module in model.base_model.named_modules()
        if _is_linear(module)
        and module is not head
        and "lora_" not in key
        and not (isinstance(exclude, str) and re.fullmatch(exclude, key.removesuffix(".base_layer")))
    ]
    found = sorted({key.removesuffix(".base_layer").rsplit(".", 1)[-1] for key in linear})
    if known := record_of(model).linears:  # peft puts no adapter on some of a few types
        found = [name for name in found if name in known]
    if lora.target_modules == "all-linear":
        return found
    raise_findings(lora.target_rules(found, "the model"))
    return sorted(set(lora.target_modules))


def adapter_layers(model: nn.Module) -> dict[str, Any]:
    """Return the layers that hold adapters, by their place in the model."""
    return {path: module for path, module in model.named_modules() if hasattr(module, "lora_A")}


def activate(model: nn.Module, names: Sequence[str]) -> None:
    """From now on run forwards with these adapters."""
    for layer in adapter_layers(model).values():
        layer._active_adapter, layer._disable_adapters = list(names), not names


@contextmanager
def active_adapters(model: nn.Module, names: Sequence[str], layers: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Run forwards with these adapters, or with none; nothing about gradients changes.

    `layers` is what `adapter_layers` gave, to spare the search.
    """
    found = list((adapter_layers(model) if layers is None else layers).values())
    before = [(layer._active_adapter, layer._disable_adapters) for layer in found]
    for layer in found:
        layer._active_adapter = list(names) if names else layer._active_adapter
        layer._disable_adapters = not names
    try:
        yield
    finally:
        for layer, (active, disabled) in zip(found, before, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled


@contextmanager
def folded_adapter(
    model: nn.Module, names: Sequence[str], layers: Mapping[str, Any], merged: Mapping[str, Tensor] | None = None
) -> Iterator[None]:
    """Run forwards without gradients as under some adapters, at the cost of none: their updates lie in the weights.

    In less than fp32 that rounds them. Every parameter is whole. `merged` is what `merged_tensors` gave; without it the
    weights are merged here. Afterwards the base's own tensors are put back as they were, not computed back.
    """
    own = {path: layer.base_layer.weight.data for path, layer in layers.items()}
    with torch.no_grad(), active_adapters(model, (), layers):
        for path, layer in layers.items():
            if not any(name in layer.scaling for name in names):
                continue
            if merged is None:
                tensors = {f"{path}.{key}": parameter for key, parameter in layer.named_parameters()}
                weight = _merged_weight(layer, path, tensors, names)
            else:
                weight = merged[f"{path}.weight"]
            layer.base_layer.weight.data = weight.to(own[path])
        try:
            yield
        finally:
            for path, layer in layers.items():
                layer.base_layer.weight.data = own[path]


def adapter_tensors(
    tensors: Mapping[str, Tensor], name: str = DEFAULT, *, heads: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Pick an adapter's tensors, and those of modules that learned beside it, and name them as peft's files do."""
    starts = tuple(f"{head}." for head in heads)
    return {
        _file_key(key, name): tensor
        for key, tensor in tensors.items()
        if is_adapter_key(key, name) or key.startswith(starts)
    }


def config_with_heads(peft_config: Any, heads: Sequence[str]) -> Any:
    """Return the configuration of a classifier's adapter whose files hold these modules too; as it is for none."""
    if not heads:
        return peft_config
    config = copy.copy(peft_config)
    config.task_type = "SEQ_CLS"
    config.modules_to_save = [head.rsplit(".", 1)[-1] for head in heads]
    return config


def base_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Pick the base model's tensors and give them their names without adapters."""
    return {key.replace(".base_layer.", "."): tensor for key, tensor in tensors.items() if "lora_" not in key}


def merged_tensors(model: Any, tensors: Mapping[str, Tensor], names: Sequence[str] = (DEFAULT,)) -> dict[str, Tensor]:
    """Return the base's tensors with the adapters added, in fp32; the live model is not touched.

    `model` gives the shape of things; `tensors` are its whole parameters by name.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    merged = {key: tensor.float() for key, tensor in base_tensors(tensors).items()}
    for path, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer) and any(name in layer.scaling for name in names):
            merged[f"{path}.weight"] = _merged_weight(layer, path, tensors, names)
    return merged


@torch.no_grad()
def merge_adapters(model: Any, names: Sequence[str]) -> None:
    """Add adapters to the weights, in fp32 before they are rounded to the weights' precision, and take all of them off.

    Afterwards every parameter learns, as in a model that was loaded.
    """
    tensors = dict(model.named_parameters())
    for path, layer in adapter_layers(model).items():
        base = layer.base_layer
        base.weight.data = _merged_weight(layer, path, tensors, names).to(base.weight)
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, base)
    del model.peft_config
    model.requires_grad_(True)


def _merged_weight(layer: Any, path: str, tensors: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """Add updates to one layer's base weight (LoRA: W + s B A; DoRA, as the first: m * that / its row norms)."""
    prefix = f"{path}."
    is_transposed = bool(layer.fan_in_fan_out)
    weight = tensors[f"{prefix}base_layer.weight"].float()
    rows = weight.T if is_transposed else weight
    for place, name in enumerate(name for name in names if name in layer.scaling):
        low = tensors[f"{prefix}lora_A.{name}.weight"].float()
        high = tensors[f"{prefix}lora_B.{name}.weight"].float()
        rows = rows + (high @ low) * float(layer.scaling[name])
        magnitude = tensors.get(f"{prefix}lora_magnitude_vector.{name}.weight")
        if magnitude is not None:
            if place > 0:
                raise StageError(f"{path}: a DoRA adapter on another adapter has no weights of its own to scale")
            rows = magnitude.float().view(-1, 1) * rows / rows.norm(dim=1, keepdim=True)
    return (rows.T if is_transposed else rows).contiguous()


def _file_key(key: str, name: str) -> str:
    plain = ".".join(part for part in key.split(".") if part != name)
    return f"{_IN_FILES}{plain.replace('lora_magnitude_vector.weight', 'lora_magnitude_vector')}"


def _task_type(model: Any) -> str:
    return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _is_transposed(model: nn.Module) -> bool:
    """GPT-2's Conv1D keeps its weight transposed."""
    return any(type(module).__name__ == "Conv1D" for module in model.modules())
