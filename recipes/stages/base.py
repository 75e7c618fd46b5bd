"""What every kind of stage answers for itself: inputs, outputs, data, batch, steps, progress, sizes, smoke form."""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast

from recipes.artifact_kinds import OutputKind
from recipes.data.images import ImageSource
from recipes.data.text import Source
from recipes.fields import Strict, added_meaning, meaning, placement
from recipes.smoke_sizes import HELD_OUT_ROWS, ROWS
from recipes.stages.lora import Lora
from recipes.stages.sharding import Shard
from recipes.stages.train import ImageTrain, Train

Template = Literal["chat", "none"]
"""How rows of plain text are put to a model: as turns of its chat template, or as they are."""
Role = Literal["text", "instructions", "labels", "seq2seq", "preferences", "prompts", "images"]
"""What the rows of a source are for."""
MAX_AUTO_MICRO_BATCH = 16
"""The largest micro-batch that `auto` takes, but for images."""
CHAT_ROLES: tuple[Role, ...] = ("instructions", "preferences", "prompts")
"""Roles of prompts and answers."""

INPUT_FIELDS = (
    "init_from", "tokenizer", "autoencoder", "text_encoder", "actor", "reward", "suites", "of", "features",
    "second_scorer",
)  # fmt: skip
"""Fields that a stage's `inputs()` and `text_start()` read, of any kind of stage."""
SOURCE_FIELDS = ("data", "evaluation", "prompts", "text", "images", "suites")
"""Fields that a stage's `sources()` reads, of any kind of stage."""


@dataclass(frozen=True, slots=True)
class Input:
    """One input of a stage: its field, what is written there, and which kinds of output fit."""

    field_path: str
    text: str
    wants: tuple[OutputKind, ...]


@dataclass(frozen=True, slots=True)
class SourceUse:
    """One data source of a stage: its field, what its rows are for, and the source with its default filled in."""

    field_path: str
    source: Source | ImageSource
    role: Role
    held_out: bool = False
    """Whether rows are taken from the source's held-out share (`hold_out`) instead of the rest."""

    @property
    def rows(self) -> Source:
        """The source of a use of text."""
        assert self.role != "images", f"{self.field_path} is a source of pictures"
        return cast(Source, self.source)

    @property
    def pictures(self) -> ImageSource:
        """The source of a use of images."""
        assert self.role == "images", f"{self.field_path} is no source of pictures"
        return cast(ImageSource, self.source)


@dataclass(frozen=True, slots=True)
class Batch:
    """What the workers share in an optimiser step, or in an iteration of rollouts."""

    field_path: str
    """The field that says how much."""
    written: int
    """Its value: sequences, pairs, images or prompts."""
    samples: int = 1
    """Responses to each prompt."""
    mini_batches: int = 1
    """Optimiser steps that an iteration is divided into."""
    text: int = 0
    """Sequences of text that are mixed into a step."""

    @property
    def size(self) -> int:
        """Samples of an optimiser step over all workers."""
        return self.written * self.samples // self.mini_batches

    def divides(self, workers: int) -> bool:
        """Whether the workers can share an iteration and each of its steps evenly."""
        return not any(number % workers for number in (self.written, self.text, self.size))

    def unit(self, workers: int) -> int:
        """What `written` must be a multiple of for that."""
        shares = self.mini_batches * workers
        return math.lcm(workers, shares // math.gcd(shares, self.samples))


Counted = Literal["tokens", "target_tokens", "rows", "pairs", "responses", "pictures"]
"""What a stage's speed may count; a beat holds it as `..._per_s`."""


@dataclass(frozen=True)
class Progress:
    """How a stage counts its way for the people who watch it."""

    unit: Literal["step", "iteration", "part"]
    counted: Counted
    """What the speed counts."""
    steps_per_unit: int = 1
    counted_per_unit: int | None = None
    """None: the weight of each step, over the time of the step alone."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Parameters of a stage's language model."""

    full: int
    """With the head that predicts tokens."""
    scored: int
    """With a head that gives one score."""
    valued: int
    """With a critic's head."""
    adapter: int
    """Of the stage's adapter; 0: it has none."""
    width: int


@dataclass(frozen=True, slots=True)
class Held:
    """Parameters that a stage trains, keeps frozen, and stores in its artifact."""

    trainable: int
    frozen: int
    stored: int
    keeps_best: bool = False
    """Whether the weights of the best iteration so far are kept next to those of the last."""


@dataclass(frozen=True, slots=True)
class Forward:
    """What a forward pass of a stage keeps in memory."""

    length: int
    """Tokens of a sequence."""
    copies: int = 1
    """Sequences of one sample."""
    logits: Literal["none", "chunks", "all"] = "chunks"
    """chunks: only a few positions at a time."""
    has_cache: bool = False
    """Whether keys and values are cached while answers are written."""
    has_backward: bool = True


class StageBase(Strict):
    """A stage of the recipe."""

    trains: ClassVar[bool] = True
    """Whether it makes a model, in steps; an evaluation only measures."""
    shown: ClassVar[tuple[str, ...]] = ()
    """Metrics that a person sees while it runs, as far as its model has them; `score` is the mean."""
    curves: ClassVar[tuple[str, ...]] = ()
    """Metrics whose curves a reader of the report looks for, in this order; the others are folded away."""
    largest_micro_batch: ClassVar[int] = MAX_AUTO_MICRO_BATCH
    """The largest micro-batch that `auto` takes."""

    if TYPE_CHECKING:
        kind: str
        shard: Shard

    seed: int | None = meaning(None, ge=0, lt=2**63, description="Seed of this stage; None takes the recipe's.")
    gate: Literal["enforce", "ignore"] = placement(
        "enforce", description="Whether this stage refuses an input whose gate failed."
    )
    verification: Literal["enforce", "ignore"] = placement(
        "enforce",
        description="Whether files unlike the trained model are withheld; ignore commits them with a failed gate.",
    )

    @abstractmethod
    def inputs(self) -> list[Input]:
        """Every input in the order of its fields; field paths are relative to the stage (`init_from`, `of.0`)."""

    @abstractmethod
    def outputs(self) -> dict[str, OutputKind]:
        """What the stage makes, by name; the first is what a bare stage name means."""

    @abstractmethod
    def sources(self) -> list[SourceUse]:
        """Every data source; a missing one is what its field's description says it defaults to."""

    @abstractmethod
    def steps(self, rows: int | None = None) -> int | None:
        """Optimiser steps; None where they follow from `rows` of data that are not counted yet; 0: an evaluation."""

    @abstractmethod
    def batch(self) -> Batch | None:
        """What the workers share in a step; None: an evaluation has no steps."""

    @abstractmethod
    def progress(self, start_family: str | None = None) -> Progress:
        """How it counts its way; `start_family` is the family of the model that it starts from."""

    @abstractmethod
    def shrunk(self, *, is_built_here: bool) -> Self:
        """The stage's smoke form; `is_built_here`: the recipe builds the model that it starts from."""

    @property
    @abstractmethod
    def is_image(self) -> bool:
        """Whether it works with models of images."""

    @property
    def adapters(self) -> Lora | None:
        """The adapters that it trains; None: it trains every parameter, or nothing."""
        lora: Lora | None = getattr(self, "lora", None)
        return lora

    @property
    def largest_zero(self) -> int:
        """The largest ZeRO stage that its model can be trained with."""
        return 3

    def text_start(self) -> str | None:
        """The reference to the language model that it works with; None: random weights, or images."""
        return None

    def image_start(self) -> str | None:
        """The reference to the diffusion model that it starts from; None: it starts from none."""
        return None

    def fp32_reason(self) -> str:
        """Why `precision: auto` is fp32 on any hardware; empty: it depends on the hardware."""
        return "bf16 hurts or slows small models of pictures" if self.is_image else ""

    def find_source(self, field_path: str) -> SourceUse | None:
        """The source at a field path (`data`, `evaluation`, `prompts`, `text`); None: nothing is read there."""
        return next((use for use in self.sources() if use.field_path == field_path), None)

    def get_source(self, field_path: str) -> SourceUse:
        """The source that this kind of stage always has at a field path."""
        found = self.find_source(field_path)
        assert found is not None, f"a {self.kind} stage reads nothing as {field_path}"
        return found


class TextStage(StageBase):
    """A stage that works with language models."""

    @property
    def is_image(self) -> bool:
        return False

    @property
    def own_template(self) -> Template | None:
        """How it says that plain text is put to its model; None: it does not say."""
        template: Template | None = getattr(self, "template", None)
        return template

    @property
    def counted_tokens(self) -> Literal["responses", "all"]:
        """Which tokens of a row its loss counts."""
        return "responses"

    @abstractmethod
    def text_length(self, use: SourceUse) -> int:
        """Most tokens of a sequence of one of its sources."""

    @abstractmethod
    def held(self, counts: Counts) -> Held:
        """What it trains, keeps and stores of its models."""

    @abstractmethod
    def forward(self) -> Forward:
        """What a forward pass keeps in memory."""


class ImageStage(StageBase):
    """A stage that trains a model of images."""

    @property
    def is_image(self) -> bool:
        return True


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
            return [training, SourceUse("evaluation", other_rows, self.data_role)]
        return [training, SourceUse("evaluation", data, self.data_role, held_out=True)] if data.hold_out else [training]

    def steps(self, rows: int | None = None) -> int | None:
        return self.train.planned_steps(rows)

    def batch(self) -> Batch:
        return Batch("train.global_batch", self.train.global_batch)

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

    def text_length(self, use: SourceUse) -> int:
        return self.train.sequence_length

    def forward(self) -> Forward:
        return Forward(self.train.sequence_length)


class ImageTraining(Training, ImageStage):
    """A stage that trains a model of images on images."""

    data_role: ClassVar[Role] = "images"
    largest_micro_batch: ClassVar[int] = 256
    """Images are small next to sequences."""

    if TYPE_CHECKING:
        data: ImageSource
        evaluation: ImageSource | None
        train: ImageTrain


def template_field(rows: str) -> Any:
    """The field `template` of a stage that reads such rows."""
    return added_meaning(
        None,
        description=f"How {rows} of plain text are put to the model: chat, as the user's and the assistant's turns in "
        "its chat template; none, as they are, one after the other. None: chat where a decoder or rnn has a template. "
        "Rows of messages always take the template.",
    )


def default_template(role: Role, has_chat_template: bool) -> Template:
    """How plain text of the role is put to a model where the recipe does not say."""
    return "chat" if has_chat_template and role in CHAT_ROLES else "none"


def held_out_use(field_path: str, source: Source | ImageSource, role: Role) -> SourceUse:
    """An evaluation reads what `hold_out` keeps away from training; of a source without it every row."""
    return SourceUse(field_path, source, role, held_out=source.hold_out > 0)
