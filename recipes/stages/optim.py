"""Optimiser and learning-rate schedule of a recipe."""

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from recipes.fields import Strict, added_meaning, meaning, refuse
from recipes.problem_codes import Code

Beta = Annotated[float, Field(ge=0, lt=1)]


class AdamW(Strict):
    """AdamW (Loshchilov & Hutter 2019)."""

    name: Literal["adamw"] = meaning("adamw", description="Adam with decoupled weight decay.")
    lr: float = meaning(gt=0, le=10, description="Peak learning rate.")
    betas: tuple[Beta, Beta] = meaning(
        (0.9, 0.999), description="Decay rates of the first and second moment, each in [0, 1)."
    )
    eps: float = meaning(1e-8, gt=0, le=1, description="Added to the denominator.")
    weight_decay: float = meaning(0.0, ge=0, le=10, description="Applied to matrices only, never to norms and biases.")


class Schedule(Strict):
    """Learning-rate factor as a function of the step: linear warm-up, then the named decay."""

    name: Literal["constant", "linear", "cosine"] = meaning("cosine", description="Shape after the warm-up.")
    warmup_steps: int = meaning(
        0, ge=0, le=10**9, description="Steps of linear warm-up from 0; must be below the stage's steps."
    )
    warmup_ratio: float = added_meaning(
        0.0, ge=0, lt=1, description="In place of warmup_steps: their share of the stage's steps, rounded up."
    )
    min_ratio: float = meaning(
        0.0, ge=0, le=1, description="Final factor of the peak learning rate (linear and cosine)."
    )

    @model_validator(mode="after")
    def _one_warmup(self) -> "Schedule":
        if self.warmup_steps and self.warmup_ratio:
            refuse(Code.CONFLICTING_KEYS, "give warmup_steps or warmup_ratio, not both")
        return self

    def warmup(self, steps_planned: int) -> int:
        """Steps of warm-up of a stage with that many; a share never takes all of them."""
        if not self.warmup_ratio:
            return self.warmup_steps
        return min(math.ceil(self.warmup_ratio * steps_planned), steps_planned - 1)
