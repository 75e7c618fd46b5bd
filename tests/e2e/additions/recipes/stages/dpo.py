"""Preference optimisation without a reward model."""

from collections.abc import Iterator
from typing import ClassVar, Literal, Self

from recipes.artifact_kinds import OutputKind
from recipes.data.text import Source
from recipes.errors import FieldFinding, Finding, at
from recipes.fields import meaning
from recipes.models.base import TextFamily
from recipes.problem_codes import Code
from recipes.stages.answers import Counts, Forward, Held, Input, Progress, Role, Template, needs_decoder, template_field
from recipes.stages.base import TextTraining
from recipes.stages.sharding import Shard
from recipes.stages.train import Train


class Dpo(TextTraining):
    """Direct preference optimisation (Rafailov et al. 2023): the model itself learns from preference pairs."""

    data_role: ClassVar[Role] = "preferences"
    shown: ClassVar[tuple[str, ...]] = ("loss", "accuracy")
    curves: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "margin")
    kind: Literal["dpo"] = meaning(description="Direct preference optimisation.")
    init_from: str = meaning(description="The model to start from, which is also the reference.")
    template: Template | None = template_field("a `prompt` and its answers")
    data: Source = meaning(description="Rows with `chosen` and `rejected`, `prompt` optional.")
    evaluation: Source | None = meaning(None, description="Held-out pairs; None: hold_out.")
    beta: float = meaning(0.1, gt=0, le=100, description="Weight of the divergence from the reference.")
    train: Train = meaning(description="Steps, batch (in pairs), optimiser, cadences.")
    shard: Shard = meaning(default_factory=Shard, description="Engine, ZeRO stage, precision.")

    def inputs(self) -> list[Input]:
        return [Input("init_from", self.init_from, ("model",))]

    def outputs(self) -> dict[str, OutputKind]:
        return {"model": "model"}

    def text_start(self) -> str:
        return self.init_from

    def refuse_model(self, family: TextFamily | None) -> Finding | None:
        return needs_decoder(self.kind, family)

    def rules(self) -> Iterator[FieldFinding]:
        if self.train.tokens is not None:
            message = "a dpo stage counts pairs, not tokens"
            yield at("train.tokens", self.train.tokens, Code.NOT_APPLICABLE, message, "give steps or epochs")

    def packing_rule(self, family: TextFamily | None) -> Finding | None:
        return Finding(Code.NOT_APPLICABLE, "pairs are never packed", "remove the key") if self.train.packing else None

    def progress(self, start_family: TextFamily | None = None) -> Progress:
        return Progress("step", "pairs")

    def shrunk(self, *, is_built_here: bool) -> Self:
        return self._fewer_rows(train=self.train.shrunk())

    def held(self, counts: Counts) -> Held:
        return Held(counts.full, counts.full, counts.full)

    def forward(self) -> Forward:
        return Forward(self.train.sequence_length, copies=2, logits="all")
