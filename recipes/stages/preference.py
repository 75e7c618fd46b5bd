"""Preference optimisation: the model itself learns from answers that people judged, without a reward model."""

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar, Literal, Self

from recipes.artifact_kinds import OutputKind
from recipes.data.text import Source
from recipes.errors import FieldFinding, at
from recipes.fields import meaning
from recipes.models.base import TextFamily
from recipes.problem_codes import Code
from recipes.stages.answers import (
    ROLES,
    Counts,
    Forward,
    Held,
    Pass,
    Progress,
    Role,
    SourceUse,
    Template,
    template_field,
)
from recipes.stages.judged import JudgedTraining
from recipes.stages.lora import Lora
from recipes.stages.preference_losses import Dpo, PreferenceLoss
from recipes.stages.sharding import Shard
from recipes.stages.train import Train


class Preference(JudgedTraining):
    """Preference optimisation: a policy learns from judged answers against its frozen start, or without one."""

    data_role: ClassVar[Role] = "preferences"
    shown: ClassVar[tuple[str, ...]] = ("loss", "accuracy")
    curves: ClassVar[tuple[str, ...]] = (
        "loss", "accuracy", "margin", "chosen_reward", "rejected_reward", "chosen_logprob", "rejected_logprob",
        "kl",
    )  # fmt: skip
    kind: Literal["preference"] = meaning(description="Preference optimisation.")
    init_from: str = meaning(description="The model to start from, which is also the reference.")
    lora: Lora | None = meaning(None, description="Train adapters; null trains every parameter.")
    merge: bool = meaning(True, description="With lora: also commit the merged model; later stages need it.")
    loss: PreferenceLoss = meaning(default_factory=Dpo, description="What is learnt from judged answers.")
    template: Template | None = template_field("a `prompt` and its answers")
    data: Source = meaning(
        description="Rows with `chosen` and `rejected`, `prompt` optional; for kto with `prompt` and "
        "`completion`, or `messages`, and a `label` that is true or false."
    )
    evaluation: Source | None = meaning(
        None, description="Held-out rows; null: python-docs' validation split or hold_out."
    )
    min_accuracy: float = meaning(
        0.55,
        ge=0,
        le=1,
        description="Gate: least share of held-out pairs whose chosen answer has the larger reward; kto: of "
        "pairs of any desirable and any undesirable one.",
    )
    train: Train = meaning(description="Steps, batch (in pairs, or answers), optimiser, cadences.")
    shard: Shard = meaning(default_factory=Shard, description="Engine, ZeRO stage, precision.")

    def sources(self) -> list[SourceUse]:
        return [replace(use, role=self.loss.role) for use in super().sources()]

    def outputs(self) -> dict[str, OutputKind]:
        if self.lora is None:
            return {"model": "model"}
        return {"model": "model", "adapter": "adapter"} if self.merge else {"adapter": "adapter"}

    def rules(self) -> Iterator[FieldFinding]:
        yield from super().rules()
        if self.train.tokens is not None:
            message = "a preference stage counts answers, not tokens"
            yield at("train.tokens", self.train.tokens, Code.NOT_APPLICABLE, message, "give steps or epochs")

    def progress(self, start_family: TextFamily | None = None) -> Progress:
        return Progress("step", "pairs" if ROLES[self.loss.role].has_pairs else "rows")

    def shrunk(self, *, is_built_here: bool) -> Self:
        # A model from outside the recipe keeps its size, and the length that its rows need.
        train = self.train.shrunk()
        if not is_built_here:
            train = train.changed(sequence_length=self.train.sequence_length)
        return self._fewer_rows(train=train, min_accuracy=0.0)

    def held(self, counts: Counts) -> Held:
        if self.lora is None:
            return Held(counts.full, 0, counts.full)
        return Held(counts.adapter, counts.frozen, counts.adapter + (counts.full if self.merge else 0))

    def forward(self) -> Forward:
        return Forward(self.train.sequence_length, copies=2, logits="all", scored=2)

    def passes(self, steps: int) -> list[Pass]:
        """The start reads every pair once, before its policy learns from it."""
        found, length = super().passes(steps), self.train.sequence_length
        if not self.loss.has_reference:
            return found
        epochs = max(1.0, self.train.epochs or 1.0)
        return [*found, Pass(2 * self.train.global_batch, length, steps / epochs, logits=length)]
