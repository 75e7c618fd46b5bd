"""Knowledge distillation."""

from collections.abc import Iterator
from typing import ClassVar, Literal, Self

from recipes.artifact_kinds import OutputKind
from recipes.data.text import Source
from recipes.errors import Finding
from recipes.fields import meaning
from recipes.models.base import TextFamily
from recipes.stages.answers import Counts, Forward, Held, Input, Progress, Role, SharedTokens, needs_decoder
from recipes.stages.sharding import Shard
from recipes.stages.train import Train
from recipes.stages.training_stage import TextTraining


class Distill(TextTraining):
    """Knowledge distillation (Hinton et al. 2015): a student learns what a teacher says of every next token."""

    data_role: ClassVar[Role] = "text"
    reads_chats: ClassVar[bool] = False
    shown: ClassVar[tuple[str, ...]] = ("loss", "agreement")
    curves: ClassVar[tuple[str, ...]] = ("loss", "agreement")
    kind: Literal["distill"] = meaning(description="Knowledge distillation.")
    init_from: str = meaning(description="The student to start from.")
    teacher: str = meaning(description="The model to learn from; it has the student's tokenizer.")
    temperature: float = meaning(1.0, gt=0, le=100, description="Divides the logits of both before the softmax.")
    data: Source = meaning(description="Texts, packed.")
    evaluation: Source | None = meaning(None, description="Held-out texts; null: hold_out.")
    train: Train = meaning(description="Steps, batch, optimiser, cadences.")
    shard: Shard = meaning(default_factory=Shard, description="Engine, ZeRO stage, precision.")

    def inputs(self) -> list[Input]:
        return [Input("init_from", self.init_from, ("model",)), Input("teacher", self.teacher, ("model",))]

    def outputs(self) -> dict[str, OutputKind]:
        return {"model": "model"}

    def text_start(self) -> str:
        return self.init_from

    def shared_tokens(self) -> Iterator[SharedTokens]:
        yield SharedTokens("teacher", self.teacher, "init_from", self.init_from)

    def refuse_model(self, family: TextFamily | None) -> Finding | None:
        return needs_decoder(self.kind, family)

    def progress(self, start_family: TextFamily | None = None) -> Progress:
        return Progress("step", "tokens")

    def shrunk(self, *, is_built_here: bool) -> Self:
        return self._fewer_rows(train=self.train.shrunk())

    def held(self, counts: Counts) -> Held:
        """A teacher that the recipe does not tell the size of is taken to be as large as the student."""
        return Held(counts.full, counts.full, counts.full)

    def forward(self) -> Forward:
        return Forward(self.train.sequence_length, logits="all", scored=2)
