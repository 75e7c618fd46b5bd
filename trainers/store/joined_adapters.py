"""Adapters that lie on each other as one adapter on the whole model below them, which stock peft opens."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainers.store.hf_loaders import ADAPTER_CONFIG, ADAPTER_WEIGHTS

if TYPE_CHECKING:
    from torch import Tensor

_PREFIX = "base_model.model."
_SIDES = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_embedding_A", ".lora_embedding_B"),
)
"""Ends of the names of the factors of an update: of a linear module, and of an embedding."""


def is_joinable(adapters: Sequence[Path]) -> bool:
    """Tell whether the adapters' updates add up, and modules that learned whole are the last word on themselves.

    DoRA scales the weights below; updates of experts are not joined; an update may lie on a module that learned whole;
    and a head may have gone.
    """
    configs = [_config(folder) for folder in adapters]
    *below, last = configs
    if any(config.get("use_dora") or config.get("target_parameters") for config in configs):
        return False
    saved = {name for config in below for name in config.get("modules_to_save") or ()}
    if saved and last.get("task_type") != below[-1].get("task_type"):
        return False
    ends = {module.rpartition(".")[2] for folder in adapters for module in _modules(_tensors(folder))}
    return saved.isdisjoint(ends)


def write_joined(adapters: Sequence[Path], target: Path) -> None:
    """Write one adapter whose update is the sum of these, the lowest first; modules beside them are the upper one's.

    sum_i s_i B_i A_i = [s_1 B_1, s_2 B_2, ...] [A_1; A_2; ...]: its rank is the sum of theirs. In fp32, so that the
    scales s_i are multiplied in without rounding that counts.
    """
    import torch
    from safetensors.torch import save_file

    configs, parts = [_config(folder) for folder in adapters], [_tensors(folder) for folder in adapters]
    joined = {key: tensor for part in parts for key, tensor in part.items() if "lora_" not in key}
    ranks: dict[str, int] = {}
    for module, (low, high) in _modules({key: tensor for part in parts for key, tensor in part.items()}).items():
        there = [(config, part) for config, part in zip(configs, parts, strict=True) if f"{module}{low}" in part]
        scales = [_scale(config, module, len(part[f"{module}{low}"])) for config, part in there]
        joined[f"{module}{low}"] = torch.cat([part[f"{module}{low}"].float() for _, part in there]).contiguous()
        highs = [part[f"{module}{high}"].float() * scale for (_, part), scale in zip(there, scales, strict=True)]
        joined[f"{module}{high}"] = torch.cat(highs, dim=1).contiguous()
        ranks[module.removeprefix(_PREFIX)] = len(joined[f"{module}{low}"])
    save_file(joined, target / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    content = {**configs[-1], **_ranks(ranks, sum(config["r"] for config in configs))}
    content |= {"use_rslora": False, "lora_dropout": 0.0}
    saved = {name for config in configs for name in config.get("modules_to_save") or ()}
    content["modules_to_save"] = sorted(saved) or None
    if any(config[key] != configs[-1][key] for config in configs for key in ("target_modules", "exclude_modules")):
        content |= {"target_modules": sorted(ranks), "exclude_modules": None}
    (target / ADAPTER_CONFIG).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _ranks(ranks: Mapping[str, int], usual: int) -> dict[str, Any]:
    """Return the keys of peft's configuration for these ranks, with the scales 1."""
    others = {module: rank for module, rank in ranks.items() if rank != usual}
    return {"r": usual, "lora_alpha": usual, "rank_pattern": others, "alpha_pattern": others}


def _modules(tensors: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Return the modules that have an update, with the ends of the names of its factors."""
    return {key.removesuffix(sides[0]): sides for sides in _SIDES for key in sorted(tensors) if key.endswith(sides[0])}


def _tensors(folder: Path) -> "dict[str, Tensor]":
    from safetensors.torch import load_file

    found: dict[str, Tensor] = load_file(folder / ADAPTER_WEIGHTS)
    return found


def _config(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / ADAPTER_CONFIG).read_bytes())
    return content


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Return what a module's product is multiplied by (Kalajdzievski 2023 where it is rank-stabilised)."""
    from peft.utils.other import get_pattern_key

    patterns = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(patterns, module.removeprefix(_PREFIX)), config["lora_alpha"])
    return float(alpha / (rank**0.5 if config.get("use_rslora") else rank))
