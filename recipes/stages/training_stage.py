"""What stages that learn from rows have in common, of text and of images."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Self

from recipes.data.images import ImageSource
from recipes.data.text import Source
from recipes.errors import FieldFinding, Finding, at
from recipes.fields import Strict
from recipes.models.architecture import TEXT_FAMILIES
from recipes.models.base import TextFamily
from recipes.models.type_table import Capability
from recipes.problem_codes import Code
from recipes.smoke_sizes import HELD_OUT_ROWS, ROWS
from recipes.stages.answers import (
    Cadence,
    Counts,
    Forward,
    Held,
    Pass,
    Role,
    SourceUse,
    TextFacts,
    held_out_use,
)
from recipes.stages.base import ImageStage, StageBase, TextStage
from recipes.stages.batch import Batch
from recipes.stages.train import ImageTrain, Train


class Training(StageBase):
    """A stage that learns from rows, step by step."""

    data_role: ClassVar[Role]
    """What its rows are for."""

    if TYPE_CHECKING:
        data: Source | ImageSource
        evaluation: Source | ImageSource | None
        train: Train | ImageTrain

    def sources(self) -> list[SourceUse]:
        """Rows to train on, and rows to evaluate on: the recipe's own, python-docs' next split, or what is held out."""
        data, training = self.data, SourceUse("data", self.data, self.data_role)
        if self.evaluation is not None:
            return [training, held_out_use("evaluation", self.evaluation, self.data_role)]
        other_rows = data.next_split()
        if other_rows is not None:
            held_out = other_rows.hold_out > 0
            return [training, SourceUse("evaluation", other_rows, self.data_role, held_out, is_derived=True)]
        if data.hold_out == 0:
            return [training]
        return [training, SourceUse("evaluation", data, self.data_role, held_out=True, is_derived=True)]

    def steps(self, rows: int | None = None) -> int | None:
        return self.train.planned_steps(rows)

    def batch(self) -> Batch:
        return Batch("train.global_batch", self.train.global_batch)

    def cadence(self) -> Cadence:
        """How often it saves and evaluates."""
        return Cadence(self.train.save_every, self.train.evaluate_every, self.train.max_skipped_steps)

    def _fewer_rows(self, **changes: Any) -> Self:
        """Its smoke form, but for the fields that a kind of stage has by itself."""
        evaluation = None if self.evaluation is None else self.evaluation.limited(HELD_OUT_ROWS)
        return self.changed(data=self.data.limited(ROWS), evaluation=evaluation, **changes)


class TextTraining(Training, TextStage):
    """A stage that trains a language model on rows."""

    if TYPE_CHECKING:
        data: Source
        evaluation: Source | None
        train: Train

    @property
    def added_tokens(self) -> list[str]:
        """Tokens that it adds to those of the model that it starts from."""
        return []

    @property
    def draws_weights(self) -> bool:
        """Whether it takes no weights of the model that it starts from."""
        return False

    def text_length(self, use: SourceUse) -> int:
        return self.train.sequence_length

    def lengths(self) -> Iterator[tuple[str, int]]:
        yield "train.sequence_length", self.train.sequence_length

    def rules(self) -> Iterator[FieldFinding]:
        yield from super().rules()
        yield from self.train.rules()

    def text_rules(self, facts: TextFacts) -> Iterator[FieldFinding]:
        yield from super().text_rules(facts)
        family = facts.family
        if family is None:
            return
        lora = self.adapters
        if lora is not None and lora.quantize is not None and not family.takes_few_bits:
            message = f"is for language models of the decoder family; this model is {family.noun}"
            yield at("lora.quantize", lora.quantize, Code.NOT_APPLICABLE, message, "remove the key")
        if not family.is_packed and self.train.tokens is not None:
            message = f"{family.noun} counts rows, not tokens"
            yield at("train.tokens", self.train.tokens, Code.NOT_APPLICABLE, message, "give steps or epochs")
        for key, owner in _owned_keys(type(self)):
            found = getattr(self, key)
            if owner is not family and found != type(self).model_fields[key].default:
                message = f"`{key}` applies to {owner.plural}; this model is {family.noun}"
                shown = "" if isinstance(found, Strict) else found
                yield at(key, shown, Code.NOT_APPLICABLE, message, "remove the key")

    def needs(self) -> dict[Capability, tuple[str, str]]:
        needed = super().needs()
        if self.train.packing:
            needed["packing"] = ("train.packing", "set it to false")
        return needed

    def packing_rule(self, family: TextFamily | None) -> Finding | None:
        if not self.train.packing:
            return None
        if family is not None and not family.is_packed:
            return Finding(Code.NOT_APPLICABLE, f"sources of {family.noun} are never packed", "remove it")
        return None

    def forward(self) -> Forward:
        return Forward(self.train.sequence_length)

    def passes(self, steps: int) -> list[Pass]:
        passed, train = self.forward(), self.train
        logits = 0 if passed.logits == "none" else passed.length
        trained = Pass(train.global_batch * passed.copies, passed.length, steps, logits, trains=True)
        if self.find_source("evaluation") is None:
            return [trained]
        evaluations = train.num_evaluations(steps)
        return [trained, Pass(train.evaluation_rows * passed.copies, passed.length, evaluations, logits)]


class ImageTraining(Training, ImageStage):
    """A stage that trains a model of images on images."""

    data_role: ClassVar[Role] = "images"

    def image_reference(self) -> tuple[str, ImageSource | str]:
        return "data", self.data

    largest_micro_batch: ClassVar[int] = 256
    """Images are small next to sequences."""

    if TYPE_CHECKING:
        data: ImageSource
        evaluation: ImageSource | None
        train: ImageTrain

    def held(self, counts: Counts) -> Held:
        if self.adapters is None:
            return Held(counts.full, counts.fixed, counts.full + counts.fixed)
        return Held(counts.adapter, counts.full + counts.fixed, counts.adapter + counts.full + counts.fixed)

    def forward(self) -> Forward:
        return Forward(1, logits="none")

    def passes(self, steps: int) -> list[Pass]:
        trained = Pass(self.train.global_batch, times=steps, trains=True)
        if self.find_source("evaluation") is None:
            return [trained]
        return [trained, Pass(self.train.evaluation_rows, times=self.train.num_evaluations(steps))]


def _owned_keys(stage: type[Strict]) -> Iterator[tuple[str, TextFamily]]:
    """The keys of a kind of stage that are for one family, and which."""
    owners = {key: family for family in TEXT_FAMILIES.values() for key in family.keys}
    yield from ((key, owners[key]) for key in stage.model_fields if key in owners)
