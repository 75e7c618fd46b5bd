"""Adapters that lie on each other as one adapter on the whole model below them, which stock peft opens."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainers.store.hf_loaders import ADAPTER_CONFIG, ADAPTER_WEIGHTS

_PREFIX, _LOW, _HIGH = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


def is_joinable(adapters: Sequence[Path]) -> bool:
    """Tell whether the adapters' updates add up: those of DoRA scale the weights below them."""
    return not any(_config(folder).get("use_dora") for folder in adapters)


def write_joined(adapters: Sequence[Path], target: Path) -> None:
    """Write one adapter whose update is the sum of these, the lowest first; modules beside it are the last one's.

    sum_i s_i B_i A_i = [s_1 B_1, s_2 B_2, ...] [A_1; A_2; ...]: its rank is the sum of theirs. In fp32, so that the
    scales s_i are multiplied in without rounding that counts.
    """
    import torch
    from safetensors.torch import load_file, save_file

    configs = [_config(folder) for folder in adapters]
    parts = [load_file(folder / ADAPTER_WEIGHTS) for folder in adapters]
    modules = sorted({key.removesuffix(_LOW) for part in parts for key in part if key.endswith(_LOW)})
    joined = {key: tensor for key, tensor in parts[-1].items() if "lora_" not in key}
    for module in modules:
        known = next(part for part in parts if f"{module}{_LOW}" in part)
        width, height = known[f"{module}{_LOW}"].shape[1], known[f"{module}{_HIGH}"].shape[0]
        lows, highs = [], []
        for config, part in zip(configs, parts, strict=True):
            low = part.get(f"{module}{_LOW}", torch.zeros(config["r"], width))
            high = part.get(f"{module}{_HIGH}", torch.zeros(height, config["r"]))
            lows.append(low.float())
            highs.append(high.float() * _scale(config))
        joined[f"{module}{_LOW}"] = torch.cat(lows).contiguous()
        joined[f"{module}{_HIGH}"] = torch.cat(highs, dim=1).contiguous()
    save_file(joined, target / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    rank = sum(config["r"] for config in configs)
    content = {**configs[-1], "r": rank, "lora_alpha": rank, "use_rslora": False, "lora_dropout": 0.0}
    if any(config[key] != configs[-1][key] for config in configs for key in ("target_modules", "exclude_modules")):
        content |= {"target_modules": [module.removeprefix(_PREFIX) for module in modules], "exclude_modules": None}
    (target / ADAPTER_CONFIG).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _config(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / ADAPTER_CONFIG).read_bytes())
    return content


def _scale(config: Mapping[str, Any]) -> float:
    """Return what an adapter's product is multiplied by (Kalajdzievski 2023 where it is rank-stabilised)."""
    rank = config["r"] ** 0.5 if config.get("use_rslora") else config["r"]
    return float(config["lora_alpha"] / rank)
