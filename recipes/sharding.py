"""How a stage is spread over its workers."""

from typing import Annotated, Literal

from pydantic import Field

from recipes.fields import Strict, Whole, meaning, placement

MAX_BUCKET = 50_000_000
"""Most elements that DeepSpeed reduces or gathers at once."""


class Shard(Strict):
    """Engine, ZeRO stage and numeric precision; DeepSpeed's JSON is generated from it."""

    engine: Literal["deepspeed", "plain"] = placement(
        "deepspeed", description="deepspeed, or a plain torch loop on one worker (the oracle of the tests)."
    )
    zero: Annotated[Literal[0, 1, 2, 3], Whole] = placement(
        2, description="ZeRO stage: 0 replicates, 1 shards the optimiser, 2 also gradients, 3 also parameters."
    )
    precision: Literal["fp32", "bf16"] = meaning(
        "fp32", description="Parameters and activations; bf16 keeps fp32 master weights and moments."
    )
    offload: Literal["none", "cpu"] = placement(
        "none", description="cpu keeps optimiser state in host memory (ZeRO 1-3, GPU workers)."
    )
    gradient_checkpointing: bool = placement(
        False, description="Recompute activations in the backward pass to save memory."
    )
    micro_batch: Literal["auto"] | Annotated[int, Field(ge=1, le=10**6)] = placement(
        "auto",
        description="Samples per forward pass and worker; auto: the largest divisor of the worker's share up to 16, "
        "with pictures up to 256.",
    )
