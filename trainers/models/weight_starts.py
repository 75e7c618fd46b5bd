"""Adapters that start from the base's weights: PiSSA (Meng et al. 2024) and OLoRA (Buyukakyildiz 2024).

Both take the start s B0 A0 away from the base. Here the base stays as it is: next to the adapter lies a frozen one,
-s B0 A0, so that the model starts as its base exactly, and what is saved is one LoRA of twice the rank on that base:
s (B A - B0 A0) = s [B, -B0] [A; A0].
"""

import copy
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from recipes.errors import RequestError
from trainers.runtime import distributed

ORIGIN = "origin"
"""Name of the frozen adapter that takes the start away."""
_HIGH = (".lora_B.weight", ".lora_embedding_B")


@torch.no_grad()
def start_from_weights(
    layers: Mapping[str, Any], name: str, method: Literal["pissa", "olora"], iterations: int | None, seed: int
) -> None:
    """Set the factors of an adapter from its layers' weights, equal on all ranks, and those of ORIGIN against them.

    `iterations` are those of a randomised SVD; None: the exact one. Raises RequestError for a rank above a weight's.
    """
    for path, layer in layers.items():
        if name not in layer.lora_A:
            continue
        weight = layer.base_layer.weight.float()
        rows = weight.T if layer.fan_in_fan_out else weight
        rank = layer.r[name]
        if rank > min(rows.shape):
            shape = " x ".join(map(str, rows.shape))
            raise RequestError(
                f"lora.init: {method} of {path} ({shape}) has rank {min(rows.shape)} at most, not {rank}"
            )
        if method == "olora":
            low, high = _by_qr(rows, rank)
        else:
            low, high = _by_svd(rows, rank, layer.scaling[name], iterations, seed)
        for factors, found, sign in ((layer.lora_A, low, 1), (layer.lora_B, high, -1)):
            shared = distributed.broadcast_tensor(found.contiguous())
            factors[name].weight.copy_(shared)
            factors[ORIGIN].weight.copy_(sign * shared)


def _by_qr(rows: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A0 [r, in] and B0 [out, r] of OLoRA."""
    orthogonal, upper = torch.linalg.qr(rows)
    return upper[:rank], orthogonal[:, :rank]


def _by_svd(rows: Tensor, rank: int, scale: float, iterations: int | None, seed: int) -> tuple[Tensor, Tensor]:
    """Return A0 [r, in] and B0 [out, r] of PiSSA, whose product times the scale is the best approximation of rank r."""
    if iterations is None:
        left, values, right = torch.linalg.svd(rows, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            left, values, right_T = torch.svd_lowrank(rows, rank, niter=iterations)
        right = right_T.T
    roots = (values[:rank] / scale).sqrt()
    return roots[:, None] * right[:rank], left[:, :rank] * roots


def has_origin(model: nn.Module) -> bool:
    """Tell whether a model's adapter started from the base's weights."""
    return ORIGIN in (getattr(model, "peft_config", None) or {})


def with_origin(own: Mapping[str, Tensor], origin: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return an adapter's tensors, by their names in files, as one with those that take its start away."""
    joined = dict(own)
    for key, tensor in origin.items():
        joined[key] = torch.cat([own[key], tensor], dim=1 if key.endswith(_HIGH) else 0)
    return joined


def doubled(peft_config: Any) -> Any:
    """Return the configuration of such an adapter: twice the ranks, the same scales."""
    config = copy.copy(peft_config)
    config.r, config.lora_alpha = 2 * config.r, 2 * config.lora_alpha
    for key in ("rank_pattern", "alpha_pattern"):
        setattr(config, key, {pattern: 2 * value for pattern, value in getattr(config, key).items()})
    return config
