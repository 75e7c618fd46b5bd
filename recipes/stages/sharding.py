"""How a stage is spread over its workers."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from recipes.fields import Strict, Whole, meaning, placement, refuse
from recipes.problem_codes import Code

FP32_BYTES = 4
MAX_BUCKET = 50_000_000
"""Most elements that DeepSpeed reduces or gathers at once."""


class Shard(Strict):
    """Engine, ZeRO stage and numeric precision; DeepSpeed's JSON is generated from it.

    `auto` is settled where a run starts (`recipes/planning/settle.py`); plan, jobs and fingerprints hold the result.
    """

    engine: Literal["auto", "deepspeed", "plain"] = placement(
        "auto",
        description="deepspeed, or plain: a torch loop whose workers each hold the whole state. auto: plain where each "
        "has room for that (several GPUs: deepspeed), else deepspeed.",
    )
    zero: Literal["auto"] | Annotated[Literal[0, 1, 2, 3], Whole] = placement(
        "auto",
        description="ZeRO stage of DeepSpeed: 0 replicates, 1 shards the optimiser, 2 gradients too, 3 parameters too. "
        "auto: the smallest that fits the workers' memory (several GPUs: from 2 on).",
    )
    precision: Literal["auto", "fp32", "bf16"] = meaning(
        "auto",
        description="Parameters and activations; bf16 keeps fp32 master weights and moments. auto: bf16 for models of "
        "text where the hardware multiplies it fast (not for rl), else fp32.",
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
        "with images up to 256, that fits the workers' memory.",
    )

    @model_validator(mode="after")
    def _sharded_by_deepspeed(self) -> "Shard":
        if self.engine == "plain" and self.zero not in ("auto", 0):
            refuse(Code.NO_EFFECT, f"zero {self.zero} has no effect without engine: deepspeed; found engine: plain")
        return self

    @property
    def value_bytes(self) -> int:
        """Bytes of a parameter or an activation."""
        return 2 if self.precision == "bf16" else FP32_BYTES

    @property
    def zero_stage(self) -> int:
        """What is sharded; what `auto` has not settled yet shards nothing."""
        return self.zero if self.engine != "plain" and self.zero != "auto" else 0

    @property
    def engine_text(self) -> str:
        """The engine as people read it: `plain`, `zero 2`."""
        return f"zero {self.zero}" if self.engine == "deepspeed" else self.engine
