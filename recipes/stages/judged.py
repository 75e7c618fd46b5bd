"""What stages share that learn from judged answers: reward models and preference optimisation."""

from typing import TYPE_CHECKING

from recipes.errors import Finding
from recipes.models.base import TextFamily
from recipes.models.type_table import Capability
from recipes.problem_codes import Code
from recipes.stages.answers import Input, Template, needs_decoder
from recipes.stages.base import StageBase
from recipes.stages.training_stage import TextTraining


def feedback_inputs(stage: StageBase) -> list[Input]:
    """The sets of preferences that a stage's sources read; of a stage with mistakes those that are sound."""
    written = ((key, getattr(stage, key, None)) for key in ("data", "evaluation"))
    return [
        Input(f"{key}.{member.field}from", member.source.made_by, ("preferences",))
        for key, source in written
        if source is not None
        for member in source.members()
        if member.source.made_by is not None
    ]


class JudgedTraining(TextTraining):
    """A stage that tunes a decoder on judged answers, and whose gate is its accuracy on held-out ones."""

    if TYPE_CHECKING:
        kind: str
        init_from: str
        template: Template | None

    def inputs(self) -> list[Input]:
        return [Input("init_from", self.init_from, ("model",)), *feedback_inputs(self)]

    def text_start(self) -> str:
        return self.init_from

    def held_out_rule(self) -> Finding | None:
        if self.find_source("evaluation") is not None:
            return None
        message = "there are no held-out rows, and the gate needs their accuracy"
        return Finding(Code.MISSING_HELD_OUT, message, "give `evaluation`, or `hold_out: 0.05` in `data`")

    def refuse_model(self, family: TextFamily | None) -> Finding | None:
        return needs_decoder(self.kind, family)

    def needs(self) -> dict[Capability, tuple[str, str]]:
        needed = super().needs()
        needed.pop("packing", None)  # judged answers never are
        return needed

    def packing_rule(self, family: TextFamily | None) -> Finding | None:
        if not self.train.packing:
            return None
        return Finding(Code.NOT_APPLICABLE, "judged answers are never packed", "remove the key")
