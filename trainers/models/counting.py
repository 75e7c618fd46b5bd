"""Sizes of a language model whose type has no closed formula, counted on the model itself without its memory."""

import json
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from recipes.models.base import Linear, Shape
from recipes.models.known_models import CountedSizes, KnownModel
from recipes.models.model_kinds import trained_kind
from recipes.models.type_table import TypeRecord, find_record
from recipes.stages.lora import module_name

TAKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
"""Keys of the number of experts that a token takes."""


def counted_model(config: Mapping[str, Any]) -> KnownModel | None:
    """Return the sizes of a configuration's model; None for a type or for keys that transformers makes no model of.

    The model is built on torch's meta device, whose tensors have shapes and no values: a second, whatever its size.
    """
    return _counted(json.dumps(dict(config), sort_keys=True, default=str))


@lru_cache(maxsize=32)
def _counted(text: str) -> KnownModel | None:
    config = json.loads(text)
    record = find_record(config.get("model_type"))
    kind = None if record is None else trained_kind(record.classes)
    if record is None or kind is None:
        return None
    import torch
    import transformers

    keys = {name: value for name, value in config.items() if name not in ("model_type", "architectures", "dtype")}
    try:
        built = transformers.AutoConfig.for_model(config["model_type"], **keys)
        with torch.device("meta"):
            model: Any = getattr(transformers, record.classes[kind])(built)
    except Exception:  # whatever a type's own code says against its keys; the worker that builds it reports it
        return None
    full = sum(parameter.numel() for parameter in model.parameters())
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    is_tied = head is not None and head.weight is embedding.weight
    own_head = 0 if head is None or is_tied else sum(parameter.numel() for parameter in head.parameters())
    sizes = CountedSizes(
        _shape(record, built, is_tied),
        full,
        full - own_head,
        _multiplied(built, model, head),
        _linears(record, model, head),
        _experts(model),
    )
    return KnownModel(sizes, built.get_text_config().vocab_size)


def _shape(record: TypeRecord, config: Any, is_tied: bool) -> Shape:
    def size(what: str, default: int) -> int:
        found = getattr(config.get_text_config(), record.shape.get(what, ""), None)
        return found if isinstance(found, int) else default

    width, heads = size("width", 1), size("heads", 1)
    positions = size("positions", 0)
    return Shape(
        layers=size("layers", 1) + size("decoder_layers", 0),
        width=width,
        heads=heads,
        kv_heads=size("kv_heads", heads),
        head_dim=size("head_dim", max(width // heads, 1)),
        intermediate=size("intermediate", 4 * width),
        positions=positions or None,
        tied=is_tied,
    )


def _multiplied(config: Any, model: Any, head: Any) -> int:
    """Count the matrices of the body; of fused experts, [E, ...], those that a token takes."""
    from torch import nn

    taken = next((getattr(config, key) for key in TAKEN if isinstance(getattr(config, key, None), int)), 1)
    left_out = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    left_out |= set() if head is None else {id(head.weight)}
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1 and id(parameter) not in left_out]
    shares = [min(taken, len(matrix)) / len(matrix) if matrix.dim() == 3 else 1.0 for matrix in matrices]
    return int(sum(matrix.numel() * share for matrix, share in zip(matrices, shares, strict=True)))


def _linears(record: TypeRecord, model: Any, head: Any) -> tuple[Linear, ...]:
    found = Counter(
        (name, *_sides(module))
        for path, module in model.base_model.named_modules()
        if (name := module_name(path)) in record.linears and module is not head and hasattr(module, "weight")
    )
    return tuple(Linear(*what, count) for what, count in found.items())


def _experts(model: Any) -> tuple[Linear, ...]:
    """Find parameters [E, I, O] of experts."""
    found = Counter[tuple[str, int, int]]()
    for path, parameter in model.named_parameters():
        if parameter.dim() == 3 and "experts" in path.split("."):
            experts, rows, columns = parameter.shape
            found[".".join(path.split(".")[-2:]), rows, columns] += experts
    return tuple(Linear(*what, count) for what, count in found.items())


def _sides(module: Any) -> tuple[int, int]:
    if hasattr(module, "in_features"):
        return module.in_features, module.out_features
    return tuple(module.weight.shape)  # type: ignore[return-value]  # Conv1D keeps its weight transposed
