"""From a recipe's `shard` to an engine: the one place that knows both."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recipes.stages.optim import AdamW
from recipes.stages.sharding import Shard
from trainers.engine.protocol import Engine, ParameterGroup
from trainers.runtime.precision import dtype_of


def parameter_group(name: str, module: nn.Module, optimizer: AdamW, *, prefix: str = "") -> ParameterGroup:
    """Gather the trainable parameters whose names start with `prefix` into one group."""
    parameters = tuple(
        (key, parameter)
        for key, parameter in module.named_parameters()
        if parameter.requires_grad and key.startswith(prefix)
    )
    return ParameterGroup(
        name, parameters, (optimizer.betas[0], optimizer.betas[1]), optimizer.eps, optimizer.weight_decay
    )


def build_engine(
    module: nn.Module, groups: Sequence[ParameterGroup], shard: Shard, *, clip: float, device: torch.device
) -> Engine:
    """Put the module on its device in its working precision, under the engine that the recipe names.

    The groups hold every trainable parameter once; names are those of `module.named_parameters()`. The fp32 masters
    start from the module's own values, not from these rounded to the working precision.
    """
    if shard.gradient_checkpointing:
        models: list[Any] = [part for part in module.modules() if hasattr(part, "gradient_checkpointing_enable")]
        for model in models:
            model.gradient_checkpointing_enable({"use_reentrant": False})
    starts = _round_parameters(module, dtype_of(shard.precision))
    module.to(device)
    match shard.engine:
        case "plain":
            from trainers.engine.plain import PlainEngine

            return PlainEngine(module, groups, clip=clip, device=device, starts=starts)
        case "deepspeed" if shard.zero != "auto":
            from trainers.engine.deepspeed import DeepSpeedEngine

            return DeepSpeedEngine(
                module,
                groups,
                zero=shard.zero,
                precision=shard.precision,
                offload=shard.offload,
                clip=clip,
                device=device,
                starts=starts,
            )
        case _:
            raise ValueError(
                f"engine {shard.engine!r} with zero {shard.zero!r} is not settled: recipes/planning/settle.py does"
            )


def _round_parameters(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Cast parameters and scalars beside them; returns by name what trainable ones were that rounding has changed."""
    starts: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        before, parameter.data = parameter.data, parameter.data.to(dtype)
        is_rounded = before.dtype != dtype and not torch.equal(parameter.data.to(before.dtype), before)
        if parameter.requires_grad and is_rounded:
            starts[name] = before
    for buffer in module.buffers():
        if buffer.dim() == 0 and buffer.is_floating_point():  # as gemma's scale of embeddings, which files do not hold
            buffer.data = buffer.data.to(dtype)  # in the precision in which a model that is opened makes it
    return starts
