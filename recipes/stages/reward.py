"""Reward models."""

from collections.abc import Iterator
from typing import ClassVar, Literal, Self

from recipes.artifact_kinds import OutputKind
from recipes.data.text import Source
from recipes.errors import FieldFinding, Finding, at
from recipes.fields import meaning
from recipes.models.base import TextFamily
from recipes.models.type_table import Capability
from recipes.problem_codes import Code
from recipes.stages.answers import Counts, Forward, Held, Input, Progress, Role, Template, needs_decoder, template_field
from recipes.stages.base import TextTraining
from recipes.stages.lora import Lora
from recipes.stages.sharding import Shard
from recipes.stages.train import Train


class Reward(TextTraining):
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

    def inputs(self) -> list[Input]:
        return [Input("init_from", self.init_from, ("model",))]

    def outputs(self) -> dict[str, OutputKind]:
        return {"model": "reward_model"}

    def text_start(self) -> str:
        return self.init_from

    def held_out_rule(self) -> Finding | None:
        if self.find_source("evaluation") is not None:
            return None
        message = "there are no held-out pairs, and the gate needs their accuracy"
        return Finding(Code.MISSING_HELD_OUT, message, "give `evaluation`, or `hold_out: 0.05` in `data`")

    def refuse_model(self, family: TextFamily | None) -> Finding | None:
        return needs_decoder(self.kind, family)

    def needs(self) -> dict[Capability, tuple[str, str]]:
        needed = super().needs()
        needed.pop("packing", None)  # pairs never are
        return {**needed, "reward_model": ("init_from", "")}

    def rules(self) -> Iterator[FieldFinding]:
        if self.train.tokens is not None:
            message = "a reward stage counts pairs, not tokens"
            yield at("train.tokens", self.train.tokens, Code.NOT_APPLICABLE, message, "give steps or epochs")

    def packing_rule(self, family: TextFamily | None) -> Finding | None:
        return Finding(Code.NOT_APPLICABLE, "pairs are never packed", "remove the key") if self.train.packing else None

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
