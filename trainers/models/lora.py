"""Low-rank adapters by peft, put into a model in place, several on one frozen base.

peft's own switches flip `requires_grad`, which sharded engines do not survive; the switches here leave it alone.
"""

import copy
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from recipes.errors import RequestError, StageError, raise_findings
from recipes.models.architecture import LINEAR_MODULES
from recipes.models.type_table import find_record
from recipes.stages.lora import ALL_LINEAR, NEW_HEADS, Lora, ModuleNames, module_name
from trainers.models.forward_forms import record_of
from trainers.models.saved_modules import names_in_files, saved_paths, saved_tensors
from trainers.models.weight_starts import ORIGIN, start_from_weights
from trainers.runtime.low_bits import is_transposed
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
    model that is no language model. The modules `heads` learn whole beside the adapter, as do `lora.modules_to_save`,
    which the configuration names.
    """
    config = _configuration(model, lora, find_targets(model, lora, exclude) if targets is None else targets, exclude)
    config.task_type = _task_type(model) if targets is None else None
    if lora.init != "default":
        _inject(model, _frozen(config), ORIGIN, seed)
        on = (*on, ORIGIN)
    _inject(model, config, name, seed)
    _demand_parameters(model, lora)
    if lora.init != "default":
        for key, parameter in model.named_parameters():
            if is_adapter_key(key, ORIGIN):
                parameter.requires_grad_(False)
        start_from_weights(adapter_layers(model), name, lora.init, lora.init_iterations, seed)
    activate(model, (*on, name))
    saved = saved_paths(model, lora.modules_to_save)
    if saved:  # after the injection: peft would put copies in their place, which shards do not survive
        config.modules_to_save = names_in_files(saved, lora.modules_to_save)
    for path in (*heads, *saved):
        model.get_submodule(path).requires_grad_(True)
    return config


def _configuration(model: Any, lora: Lora, targets: Sequence[str] | str, exclude: Sequence[str] | str) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        exclude_modules=(exclude if isinstance(exclude, str) else list(exclude)) or None,
        use_dora=lora.dora,
        use_rslora=lora.rank_stabilised,
        fan_in_fan_out=any(map(is_transposed, model.modules())),
        target_parameters=list(lora.target_parameters) or None,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
    )


@torch.no_grad()
def put_adapter(model: Any, folder: Path, name: str) -> dict[str, Tensor]:
    """Add a saved adapter, frozen and without its dropout; returns the tensors of modules that learned beside it.

    Raises StageError unless the folder's file holds exactly the adapter's tensors.
    """
    from peft import LoraConfig

    content = read_json(folder, ADAPTER_CONFIG, linked_file)
    fields = (
        "r", "lora_alpha", "target_modules", "exclude_modules", "use_dora", "use_rslora", "fan_in_fan_out",
        "target_parameters", "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern",
    )  # fmt: skip
    _inject(model, LoraConfig(**{key: content[key] for key in fields if key in content}), name, 0)
    heads = fill_adapter(model, folder, name)
    for parameter in adapter_tensors(dict(model.named_parameters()), name).values():
        parameter.requires_grad_(False)
    return heads


@torch.no_grad()
def fill_adapter(model: Any, folder: Path, name: str = DEFAULT) -> dict[str, Tensor]:
    """Give an adapter the values of a saved one; returns the tensors of modules that learned beside that.

    Raises StageError unless the folder's file holds exactly the adapter's tensors.
    """
    saved = load_file(folder / ADAPTER_WEIGHTS)
    heads = {key.removeprefix(_IN_FILES): saved.pop(key) for key in list(saved) if "lora_" not in key}
    own = adapter_tensors(dict(model.named_parameters()), name)
    if own.keys() != saved.keys():
        raise StageError(f"{folder}: keys differ from the adapter's: {sorted(own.keys() ^ saved.keys())[:8]}")
    for key, parameter in own.items():
        parameter.copy_(saved[key])
    return heads


def is_form_of(folder: Path, lora: Lora) -> bool:
    """Tell whether a saved adapter has the form that a recipe gives its own, so that it can go on learning as that."""
    content = read_json(folder, ADAPTER_CONFIG, linked_file)
    wanted = {
        "r": lora.r, "lora_alpha": lora.alpha, "use_dora": lora.dora, "use_rslora": lora.rank_stabilised,
        "rank_pattern": dict(lora.rank_pattern), "alpha_pattern": dict(lora.alpha_pattern),
        "target_parameters": list(lora.target_parameters),
    }  # fmt: skip
    if any((content.get(key) or type(value)()) != value for key, value in wanted.items()):
        return False
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        paths = {key.partition(".lora_")[0] for key in file.keys() if ".lora_" in key}  # noqa: SIM118
    return all(map(lora.takes, {module_name(path) for path in paths})) and not (
        lora.modules_to_save or content.get("modules_to_save")
    )


def _inject(model: Any, config: Any, name: str, seed: int) -> None:
    """Add an adapter that learns; of the others those learn that did, and of the base nothing."""
    from peft import inject_adapter_in_model

    learning = {key for key, parameter in model.named_parameters() if parameter.requires_grad and "lora_" in key}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed)
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        # Written by peft itself for experts that transformers fuses, whether or not the model has such.
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
        warnings.filterwarnings("ignore", message="target_parameters=")  # `_demand_parameters` raises for each
        inject_adapter_in_model(config, model, adapter_name=name)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(key in learning or is_adapter_key(key, name))


def _frozen(config: Any) -> Any:
    """Return the configuration of an adapter that does not learn."""
    found = copy.copy(config)
    found.lora_dropout = 0.0
    return found


def _demand_parameters(model: nn.Module, lora: Lora) -> None:
    """Raise RequestError for a name of `target_parameters` that is no parameter's."""
    found = [
        f".{plain_name(path)}.{layer.parameter_name}"
        for path, layer in adapter_layers(model).items()
        if hasattr(layer, "parameter_name")
    ]
    for target in lora.target_parameters:
        if not any(name.endswith(f".{target}") for name in found):
            raise RequestError(f"lora.target_parameters: the model has no parameter {target!r} of fused experts")


def plain_name(name: str) -> str:
    """Return a name as it is without adapters; layers of several lie in each other."""
    return ".".join(part for part in name.split(".") if part != "base_layer")


def modules_in(folder: Path) -> list[str]:
    """Return the names of the modules that a saved adapter brings whole."""
    return list(read_json(folder, ADAPTER_CONFIG, linked_file).get("modules_to_save") or ())


def start_names(count: int) -> tuple[str, ...]:
    """Return the names of as many adapters that a model starts with, the lowest first."""
    return tuple(f"start{number}" for number in range(1, count + 1))


def is_adapter_key(key: str, name: str = DEFAULT) -> bool:
    """Tell whether a parameter belongs to the adapter of that name."""
    parts = key.split(".")
    return any(part.startswith("lora_") for part in parts) and name in parts


def find_targets(model: Any, lora: Lora, exclude: Sequence[str] | str = ()) -> list[str] | str:
    """Return the names of the modules that get an adapter, or the pattern of their paths.

    Raises RequestError for a name or a pattern that means none, and for one of a tied pair. Where `exclude` is a
    pattern, modules that match it have no name here.
    """
    linears = target_names(model, exclude)
    if lora.target_modules == ALL_LINEAR:
        return [name for name in linears if lora.takes(name)]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    paths = {id(module): path for path, module in model.named_modules()}
    embedded_at, predicted_at = paths.get(id(embedding)), paths.get(id(head))
    is_tied = head is not None and head.weight is embedding.weight
    if isinstance(lora.target_modules, str):
        pattern = re.compile(lora.target_modules)
        if not any(pattern.fullmatch(path) for path in paths.values()):
            raise RequestError(f"lora.target_modules: no module's path matches {lora.target_modules!r}")
        if is_tied and any(path is not None and pattern.fullmatch(path) for path in (embedded_at, predicted_at)):
            raise RequestError(f"lora.target_modules: {embedded_at} and {predicted_at} are one tensor")
        return lora.target_modules
    names = ModuleNames("the model", linears, _name(embedded_at), _name(predicted_at), NEW_HEADS, is_tied)
    raise_findings(lora.target_rules(names))
    return sorted(set(lora.target_modules))


def _name(path: str | None) -> str | None:
    return None if path is None else module_name(path)


def target_names(model: Any, exclude: Sequence[str] | str = ()) -> list[str]:
    """Return the names of the linear modules that an adapter can be put on; those that match a pattern have none.

    The head has none either; it lies in the base of an encoder-decoder.
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
    found = sorted({module_name(key.removesuffix(".base_layer")) for key in linear})
    known = set(record_of(model).linears)  # peft puts no adapter on some of a few types
    if find_record(kind := model.config.model_type) is None:  # the record is that of its language part
        known.update(LINEAR_MODULES.get(kind, ()))
    return [name for name in found if name in known] if known else found


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


def adapter_tensors(
    tensors: Mapping[str, Tensor],
    name: str = DEFAULT,
    *,
    heads: Sequence[str] = (),
    tied: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Tensor]:
    """Pick an adapter's tensors, and those of modules that learned beside it, and name them as peft's files do.

    `tied` is what `tied_names` gives.
    """
    picked = {key: tensor for key, tensor in tensors.items() if is_adapter_key(key, name)}
    return {_file_key(key, name): tensor for key, tensor in (picked | saved_tensors(tensors, heads, tied)).items()}


def config_with_heads(peft_config: Any, heads: Sequence[str]) -> Any:
    """Return the configuration of a classifier's adapter whose files hold these modules too; as it is for none."""
    if not heads:
        return peft_config
    config = copy.copy(peft_config)
    config.task_type = "SEQ_CLS"
    names = [*(head.rsplit(".", 1)[-1] for head in heads), *(peft_config.modules_to_save or ())]
    config.modules_to_save = list(dict.fromkeys(names))
    return config


def _file_key(key: str, name: str) -> str:
    plain = ".".join(part for part in key.split(".") if part != name)
    return f"{_IN_FILES}{plain.replace('lora_magnitude_vector.weight', 'lora_magnitude_vector')}"


def _task_type(model: Any) -> str:
    return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_transposed(module)
