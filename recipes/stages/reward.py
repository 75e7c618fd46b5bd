"""Reward models."""

from collections.abc import Iterator
from typing import ClassVar, Literal, Self

from recipes.artifact_kinds import OutputKind
from recipes.data.text import Source
from recipes.errors import FieldFinding, at
from recipes.fields import meaning
from recipes.models.base import TextFamily
from recipes.models.type_table import Capability
from recipes.problem_codes import Code
from recipes.stages.answers import Counts, Forward, Held, Progress, Role, Template, template_field
from recipes.stages.judged import JudgedTraining
from recipes.stages.lora import Lora
from recipes.stages.sharding import Shard
from recipes.stages.train import Train


class Reward(JudgedTraining):
    """Reward model: backbone and scalar head, Bradley-Terry loss on chosen against rejected."""

    data_role: ClassVar[Role] = "preferences"
    shown: ClassVar[tuple[str, ...]] = ("loss", "accuracy")
    curves: ClassVar[tuple[str, ...]] = ("loss", "score_mean", "accuracy", "margin")
    kind: Literal["reward"] = meaning(description="Reward modelling.")
    init_from: str = meaning(description="The model to start from.")
    lora: Lora | None = meaning(None, description="Train adapters and the head; null trains every parameter.")
    template: Template | None = template_field("a `prompt` and its answers")
    data: Source = meaning(description="Rows with `chosen` and `rejected`, `prompt` optional.")
    evaluation: Source | None = meaning(
        None, description="Held-out pairs; null: python-docs' validation split or hold_out."
    )
    center_coefficient: float = meaning(
        0.0, ge=0, le=10, description="Weight of (r_chosen + r_rejected)^2, which centres scores."
    )
    min_accuracy: float = meaning(0.55, ge=0, le=1, description="Gate: least share of held-out pairs ranked right.")
    train: Train = meaning(description="Steps, batch (in pairs), optimiser, cadences.")
    shard: Shard = meaning(default_factory=Shard, description="Engine, ZeRO stage, precision.")

    def outputs(self) -> dict[str, OutputKind]:
        return {"model": "reward_model"}

    def needs(self) -> dict[Capability, tuple[str, str]]:
        return {**super().needs(), "reward_model": ("init_from", "")}

    def rules(self) -> Iterator[FieldFinding]:
        yield from super().rules()
        if self.train.tokens is not None:
            message = "a reward stage counts pairs, not tokens"
            yield at("train.tokens", self.train.tokens, Code.NOT_APPLICABLE, message, "give steps or epochs")

    def progress(self, start_family: TextFamily | None = None) -> Progress:
        return Progress("step", "pairs")

    def shrunk(self, *, is_built_here: bool) -> Self:
        return self._fewer_rows(train=self.train.shrunk(), min_accuracy=0.0)

    def held(self, counts: Counts) -> Held:
        if self.lora is None:
            return Held(counts.scored, 0, counts.scored)
        return Held(counts.adapter + counts.width, counts.full, counts.adapter + counts.scored)

    def forward(self) -> Forward:
        return Forward(self.train.sequence_length, copies=2, logits="none")
