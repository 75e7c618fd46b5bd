"""The time axis of a training stage: how long, in which batches, with which optimiser, saving and evaluating when."""

import math
from collections.abc import Iterator
from typing import Any, Self

from pydantic import model_validator

from recipes.errors import FieldFinding, at
from recipes.fields import Steps, Strict, meaning, placement, refuse
from recipes.models.images.base import VENDI_IMAGES
from recipes.problem_codes import Code
from recipes.smoke_sizes import BATCH, HELD_OUT_ROWS, SEQUENCE, STEPS
from recipes.stages.optim import AdamW, Schedule


class _Steps(Strict):
    """The time axis of every training stage."""

    steps: int | None = meaning(None, ge=1, le=10**9, description="Optimiser steps.")
    epochs: float | None = meaning(None, gt=0, le=10**6, description="Passes over the data; rounded up to whole steps.")
    global_batch: int = meaning(
        ge=1, le=10**6, description="Sequences, pairs or images per optimiser step over all workers."
    )
    optimizer: AdamW = meaning(description="The optimiser.")
    schedule: Schedule = meaning(default_factory=Schedule, description="Learning-rate schedule.")
    gradient_clipping: float = meaning(1.0, gt=0, le=10**6, description="Largest global gradient norm.")
    save_every: Steps = placement(
        100, description="Steps between two commits of resumable state; the last step is always saved."
    )
    evaluate_every: Steps = placement(
        100, description="Steps between two evaluations on held-out rows; the end is always evaluated."
    )
    evaluation_rows: int = meaning(
        256, ge=1, le=10**6, description="At most this many held-out sequences, pairs or images per evaluation."
    )
    max_skipped_steps: int = meaning(
        3,
        ge=0,
        le=10**6,
        description="Steps skipped for a non-finite loss or gradient before the stage fails with the sample ids.",
    )

    def planned_steps(self, rows: int | None = None) -> int | None:
        """Optimiser steps; `epochs` needs `rows`, the sequences, pairs or images in the data (None without)."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return None if rows is None else max(1, math.ceil(self.epochs * rows / self.global_batch))

    def num_evaluations(self, steps: int) -> int:
        """Evaluations in so many steps; the end is always evaluated."""
        return -(-steps // self.evaluate_every)

    def _shrunk(self, batch: int, **changes: Any) -> Self:
        steps = min(self.steps or STEPS, STEPS)
        return self.changed(
            steps=steps,
            epochs=None,
            global_batch=min(self.global_batch, batch),
            schedule=self.schedule.changed(warmup_steps=min(self.schedule.warmup_steps, steps // 4)),
            save_every=min(self.save_every, 4),
            evaluate_every=min(self.evaluate_every, 4),
            evaluation_rows=min(self.evaluation_rows, HELD_OUT_ROWS),
            **changes,
        )


def _check_length(train: _Steps, names: tuple[str, ...]) -> None:
    """Raise refuse unless exactly one of the names gives the length, and the warm-up ends before the steps do."""
    given = [name for name in names if getattr(train, name) is not None]
    if len(given) != 1:
        found = "none of them" if not given else " and ".join(given)
        listed = ", ".join(names[:-1]) + f" and {names[-1]}"
        code = Code.CONFLICTING_KEYS if given else Code.MISSING_KEY
        refuse(code, f"give exactly one of {listed}; found {found}")
    if train.steps is not None and train.schedule.warmup_steps >= train.steps:
        refuse(
            Code.WARMUP_TOO_LONG,
            f"schedule.warmup_steps ({train.schedule.warmup_steps}) must be below steps ({train.steps})",
        )


class Train(_Steps):
    """Exactly one of steps, tokens and epochs gives the length; micro-batch and accumulation are derived."""

    tokens: int | None = meaning(
        None, ge=1, le=10**15, description="Training tokens; rounded up to whole steps (packed text only)."
    )
    sequence_length: int = meaning(
        ge=8, le=10**7, description="Tokens per sequence; longer rows are truncated or split and counted."
    )
    packing: bool = meaning(
        True, description="Fill sequences with several rows; attention never crosses a row's border."
    )

    @model_validator(mode="after")
    def _one_length(self) -> "Train":
        _check_length(self, ("steps", "tokens", "epochs"))
        return self

    def rules(self) -> Iterator[FieldFinding]:
        """Tokens where rows are not packed; a warm-up past the steps that follow from tokens."""
        if self.tokens is None:
            return
        if not self.packing:
            message = "tokens has no effect without packing, and packing is false"
            yield at("train.tokens", self.tokens, Code.UNMET_REQUIREMENT, message, "give steps or epochs")
        steps, warmup = self.planned_steps(), self.schedule.warmup_steps
        if steps is not None and warmup >= steps:
            message = (
                f"warmup_steps must be below the stage's {steps} steps (tokens {self.tokens} / "
                f"(global_batch {self.global_batch} x sequence_length {self.sequence_length}))"
            )
            yield at("train.schedule.warmup_steps", warmup, Code.WARMUP_TOO_LONG, message)

    def planned_steps(self, rows: int | None = None) -> int | None:
        """Optimiser steps; `epochs` needs `rows`, the sequences or pairs in the data (None without)."""
        if self.tokens is not None:
            return math.ceil(self.tokens / (self.global_batch * self.sequence_length))
        return super().planned_steps(rows)

    def shrunk(self) -> Self:
        """The smoke form."""
        return self._shrunk(BATCH, tokens=None, sequence_length=min(self.sequence_length, SEQUENCE))


class ImageTrain(_Steps):
    """Exactly one of steps and epochs gives the length; micro-batch and accumulation are derived."""

    grid: int = placement(
        64, ge=0, le=1024, description="Images drawn at fixed seeds at every evaluation for the report; 0: none."
    )

    @model_validator(mode="after")
    def _one_length(self) -> "ImageTrain":
        _check_length(self, ("steps", "epochs"))
        return self

    def shrunk(self) -> Self:
        """The smoke form."""
        return self._shrunk(2 * BATCH, grid=min(self.grid, VENDI_IMAGES))
