"""Reward models."""

import math
from collections.abc import Iterator
from typing import ClassVar, Literal, Self

from pydantic import model_validator

from recipes.artifact_kinds import OutputKind
from recipes.data.text import Source
from recipes.errors import FieldFinding, at
from recipes.fields import Strict, added_meaning, meaning, refuse
from recipes.models.base import TextFamily
from recipes.models.type_table import Capability
from recipes.problem_codes import Code
from recipes.stages.answers import Counts, Forward, Held, Pass, Progress, Role, Template, template_field
from recipes.stages.judged import JudgedTraining
from recipes.stages.lora import NEW_HEADS, Lora
from recipes.stages.sharding import Shard
from recipes.stages.train import Train


class Negatives(Strict):
    """Answers that the stage makes itself, and that the chosen ones are compared with in place of the rejected ones."""

    samples: float = meaning(
        0.0,
        ge=0,
        le=1,
        description="Share of a step's pairs: what the stage's start answers, as a policy that starts there does.",
    )
    other_answers: float = meaning(
        0.0, ge=0, le=1, description="Share of a step's pairs: the chosen answer to another prompt."
    )
    first_halves: float = meaning(
        0.0, ge=0, le=1, description="Share of a step's pairs: the first half of the chosen answer."
    )
    random_tokens: float = meaning(
        0.0,
        ge=0,
        le=1,
        description="Share of a step's pairs: tokens drawn by chance, as many as the chosen answer has.",
    )
    max_new_tokens: int = meaning(64, ge=1, le=10**6, description="Most tokens of a sample.")

    @model_validator(mode="after")
    def _shares(self) -> "Negatives":
        total = sum(self.shares().values())
        if total == 0:
            refuse(Code.MISSING_KEY, f"give a share of {', '.join(self.shares())}")
        if total > 1:
            refuse(Code.OUT_OF_RANGE, f"the shares add up to {total:g}, more than 1")
        return self

    def shares(self) -> dict[str, float]:
        """Each kind of answer and its share."""
        kinds = ("samples", "other_answers", "first_halves", "random_tokens")
        return {kind: getattr(self, kind) for kind in kinds}


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
    negatives: Negatives | None = added_meaning(
        None,
        description="Answers that the stage makes itself, so that the reward model knows what no data has: noise, "
        "halves, what its own start writes. null: every pair is as the data has it. Held-out pairs always are.",
    )
    center_coefficient: float = meaning(
        0.0, ge=0, le=10, description="Weight of (r_chosen + r_rejected)^2, which centres scores."
    )
    min_accuracy: float = meaning(0.55, ge=0, le=1, description="Gate: least share of held-out pairs ranked right.")
    train: Train = meaning(description="Steps, batch (in pairs), optimiser, cadences.")
    shard: Shard = meaning(default_factory=Shard, description="Engine, ZeRO stage, precision.")

    def outputs(self) -> dict[str, OutputKind]:
        return {"model": "reward_model"}

    def new_heads(self, family: TextFamily | None) -> tuple[str, ...]:
        return NEW_HEADS

    def needs(self) -> dict[Capability, tuple[str, str]]:
        needed: dict[Capability, tuple[str, str]] = {**super().needs(), "reward_model": ("init_from", "")}
        if self.negatives is not None and self.negatives.samples:
            needed["generation"] = ("negatives.samples", "remove the key")
        return needed

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
        frozen = counts.scored - counts.width - counts.saved
        return Held(counts.adapter + counts.width, frozen, counts.adapter + counts.scored)

    def forward(self) -> Forward:
        return Forward(self.train.sequence_length, copies=2, logits="none")

    def passes(self, steps: int) -> list[Pass]:
        found = super().passes(steps)
        if self.negatives is None or not self.negatives.samples:
            return found
        written = self.train.global_batch * self.negatives.samples
        new = self.negatives.max_new_tokens
        return [*found, Pass(math.ceil(written), self.train.sequence_length, steps, new, writes=new)]
