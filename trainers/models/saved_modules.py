"""Modules that learn whole next to an adapter and travel in its files: peft's `modules_to_save`.

They learn in place. Of a tied pair both are named, and the files hold the tensor under both names, since stock peft
opens each as a module with its own weights.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recipes.errors import RequestError


def tied_names(model: nn.Module) -> Mapping[str, str]:
    """Return the names of parameters that are other parameters: the name -> the one that has the tensor."""
    found: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return found


def saved_paths(model: Any, names: Sequence[str]) -> tuple[str, ...]:
    """Return the paths of the modules with these names, or paths that end so, and of those that are tied to them.

    Raises RequestError for a name that no module has, a module with an adapter, and a tensor that is shared by an
    encoder and a decoder.
    """
    modules = dict(model.named_modules())
    found = dict.fromkeys(path for path in modules if _is_named(path, names))
    for name in names:
        if not any(_is_named(path, [name]) for path in found):
            raise RequestError(f"lora.modules_to_save: the model has no module {name!r}")
    for path in found:
        if hasattr(modules[path], "base_layer"):
            raise RequestError(f"lora.modules_to_save: {path} has an adapter below, and cannot learn whole")
    for pair in tied_names(model).items():
        places = [name.rpartition(".")[0] for name in pair]
        if not found.keys().isdisjoint(places):
            if model.config.is_encoder_decoder:
                raise RequestError(f"lora.modules_to_save: encoder and decoder share the tensor of {places[0]}")
            found |= dict.fromkeys(places)
    return tuple(path for path in modules if path in found)


def names_in_files(paths: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return `modules_to_save` of peft's configuration: the names, and those of modules that are tied to theirs."""
    twins = {path.rpartition(".")[2] for path in paths if not _is_named(path, names)}
    return sorted({*names, *twins})


def saved_tensors(tensors: Mapping[str, Tensor], paths: Sequence[str], tied: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the tensors of modules by their names, those of tied ones under each of them."""
    starts = tuple(f"{path}." for path in paths)
    own = {name: tensor for name, tensor in tensors.items() if name.startswith(starts)}
    return own | {
        name: tensors[source]
        for name, source in tied.items()
        if name.startswith(starts) and name not in own and source in tensors
    }


@torch.no_grad()
def put_saved(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors of modules into a model; a tied pair that they tell apart, or name half of, is a pair no longer."""
    for name, source in dict(tied_names(model)).items():
        both = [tensors.get(name), tensors.get(source)]
        if any(tensor is not None for tensor in both) and not _are_equal(*both):
            _untie(model, name)
    for name, tensor in tensors.items():
        model.get_parameter(name).copy_(tensor)


def _untie(model: Any, name: str) -> None:
    path, _, leaf = name.rpartition(".")
    own = nn.Parameter(model.get_parameter(name).detach().clone(), requires_grad=False)
    setattr(model.get_submodule(path), leaf, own)
    model.all_tied_weights_keys = {key: source for key, source in tied_names(model).items() if key != name}
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False


def _are_equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)


def _is_named(path: str, names: Sequence[str]) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in names)
