"""What every kind of stage answers for itself: inputs, outputs, data, batch, steps, progress, sizes, smoke form."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from recipes.artifact_kinds import OutputKind
from recipes.data.images import ImageSource
from recipes.data.tokenizers import Tokenizer
from recipes.errors import FieldFinding, Finding, RequestError, at, raise_findings
from recipes.fields import Strict, meaning, placement
from recipes.models.architecture import TYPES, Architecture
from recipes.models.base import TextFamily
from recipes.models.images.base import ImageModel
from recipes.models.type_table import WORDS, Capability
from recipes.problem_codes import Code
from recipes.stages.answers import (
    Counts,
    Forward,
    Held,
    Input,
    Labelling,
    Pass,
    Progress,
    SharedTokens,
    SourceUse,
    Template,
    TextFacts,
    TokenizerId,
)
from recipes.stages.batch import MAX_AUTO_MICRO_BATCH, Batch
from recipes.stages.environments import AnyEnvironment
from recipes.stages.lora import Lora
from recipes.stages.rewards.term import Term
from recipes.stages.rollout import Sampling
from recipes.stages.sharding import Shard


class StageBase(Strict):
    """A stage of the recipe."""

    trains: ClassVar[bool] = True
    """Whether it makes a model, in steps; an evaluation only measures."""
    compares_models: ClassVar[bool] = False
    """Whether its result is a report on models."""
    shown: ClassVar[tuple[str, ...]] = ()
    """Metrics that a person sees while it runs, as far as its model has them; `score` is the mean."""
    curves: ClassVar[tuple[str, ...]] = ()
    """Metrics whose curves a reader of the report looks for, in this order; the others are folded away."""
    largest_micro_batch: ClassVar[int] = MAX_AUTO_MICRO_BATCH
    """The largest micro-batch that `auto` takes."""

    if TYPE_CHECKING:
        kind: str
        shard: Shard

    seed: int | None = meaning(None, ge=0, lt=2**63, description="Seed of this stage; null takes the recipe's.")
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
    def progress(self, start_family: TextFamily | None = None) -> Progress:
        """How it counts its way; `start_family` is the family of the model that it starts from."""

    @abstractmethod
    def shrunk(self, *, is_built_here: bool) -> Self:
        """The stage's smoke form; `is_built_here`: the recipe builds the model that it starts from."""

    @abstractmethod
    def passes(self, steps: int) -> list[Pass]:
        """What goes through its models in so many steps, every sequence at its longest."""

    @abstractmethod
    def held(self, counts: Counts) -> Held:
        """What it trains, keeps and stores of its models."""

    @abstractmethod
    def forward(self) -> Forward:
        """What a forward pass keeps in memory."""

    def sampler_bytes(self, parameters: int) -> int:
        """Memory of a process that samples for each worker, of a model of so many parameters; 0: there is none."""
        return 0

    @property
    @abstractmethod
    def is_image(self) -> bool:
        """Whether it works with models of images."""

    @property
    def adapters(self) -> Lora | None:
        """The adapters that it trains; None: it trains every parameter, or nothing."""
        lora: Lora | None = getattr(self, "lora", None)
        return lora

    def no_saved_modules(self, key: str) -> Finding | None:
        """Why its adapters do not take this key (modules_to_save, target_parameters, init); None: they do."""
        return None

    def no_quantised_base(self) -> Finding | None:
        """Why the base of its adapter is not kept in few bits; None: it can be."""
        return None

    @property
    def largest_zero(self) -> int:
        """The largest ZeRO stage that its model can be trained with."""
        on_parameters = self.adapters is not None and bool(self.adapters.target_parameters)
        return 2 if on_parameters else 3  # ZeRO 3 gathers a module's own parameters, and these are another's

    @property
    def keeps_samples(self) -> bool:
        """Whether the store keeps what it samples of a language model, so that this can be recomputed."""
        return False

    @property
    def labelling(self) -> Labelling | None:
        """How people judge what it makes before it is done; None: they do not."""
        return None

    @property
    def converses_with(self) -> AnyEnvironment | None:
        """What answers the turns of its answers; None: these are single turns."""
        return None

    @property
    def terms(self) -> Mapping[str, Term]:
        """The terms of a reward that it asks about responses, by name."""
        return {}

    def placed_terms(self) -> Iterator[tuple[str, Term]]:
        """Every term that judges text, a benchmark's scorers too, with the field where it stands."""
        yield from ((f"rewards.{name}", term) for name, term in self.terms.items())

    def text_start(self) -> str | None:
        """The reference to the language model that it works with; None: random weights, or images."""
        return None

    def image_start(self) -> str | None:
        """The reference to the diffusion model that it starts from; None: it starts from none."""
        return None

    def rules(self) -> Iterator[FieldFinding]:
        """What is wrong with its own values."""
        yield from ()

    def missing(self) -> Iterator[FieldFinding]:
        """What this machine lacks for it."""
        yield from ()

    def held_out_rule(self) -> Finding | None:
        """Why it needs held-out rows that it has not; None: it has them, or does without."""
        return None

    def no_checkpointing(self) -> Finding | None:
        """Why it cannot recompute activations; None: it can."""
        return None

    def image_reference(self) -> tuple[str, ImageSource | str] | None:
        """What images and models of images that it meets must fit: in words, and the source or the reference to a
        model; None: it meets none.
        """
        return None

    def fp32_reason(self) -> str:
        """Why `precision: auto` is fp32 on any hardware; empty: it depends on the hardware."""
        return "bf16 hurts or slows small models of images" if self.is_image else ""

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

    reads_chats: ClassVar[bool] = True
    """Whether its rows are prompts with answers, which a chat template may put to its model."""

    def refuse_model(self, family: TextFamily | None) -> Finding | None:
        """Why it cannot work with a language model of a family; None: it can, or the family is not known."""
        return None

    def text_rules(self, facts: TextFacts) -> Iterator[FieldFinding]:
        """Keys that do not fit the model that it works with."""
        lacks = TYPES[facts.type].lacks if facts.type in TYPES else {}
        for capability, (field_path, advice) in self.needs().items():
            if (reason := lacks.get(capability)) is not None:
                message = f"{facts.type} does not work with {WORDS[capability]}: {reason}"
                yield at(field_path, "", Code.UNSUPPORTED_MODEL, message, advice)
                if capability == "training":
                    return

    def needs(self) -> dict[Capability, tuple[str, str]]:
        """What it asks of its model's type: the field that does so, and what would do instead."""
        needed: dict[Capability, tuple[str, str]] = {}
        if self.trains:
            needed["training"] = ("architecture.type" if self.text_start() is None else "init_from", "")
        if self.adapters is not None:
            needed["adapters"] = ("lora", "remove the key: every parameter is trained then")
        if self.shard.gradient_checkpointing:
            needed["checkpointing"] = ("shard.gradient_checkpointing", "set it to false")
        return needed

    def packing_rule(self, family: TextFamily | None) -> Finding | None:
        """Why `train.packing: true` in a recipe's text has no effect; None: it has one, or is not there."""
        return None

    def check_model(self, facts: TextFacts) -> None:
        """Raise RequestError with what its rules find about a model that is there."""
        if (finding := self.refuse_model(facts.family)) is not None:
            raise RequestError.of(finding)
        raise_findings(self.text_rules(facts))

    def rules(self) -> Iterator[FieldFinding]:
        yield from super().rules()
        if self.adapters is None and not self.commits_merged:
            yield at("merge", False, Code.NO_EFFECT, "merge has no effect without lora", "remove the key")
        if self.adapters is not None and self.shard.zero != "auto" and self.shard.zero > self.largest_zero:
            message = "adapters on parameters need each of these whole on every worker"
            yield at("shard.zero", self.shard.zero, Code.OUT_OF_RANGE, message, f"at most {self.largest_zero}")

    def lengths(self) -> Iterator[tuple[str, int]]:
        """Fields that say how many tokens a sequence of its model has, and what they say."""
        yield from ()

    def shared_tokens(self) -> Iterator[SharedTokens]:
        """Pairs of its models that read each other's tokens, and so need one tokenizer."""
        yield from ()

    def tokenizer_rules(self, known: Callable[[str, str], TokenizerId | None]) -> Iterator[FieldFinding]:
        """Models that read each other's tokens and have different tokenizers; `known` tells, of an input's field and
        text, which one it has (None: that is not known yet).
        """
        for pair in self.shared_tokens():
            found = pair.rule(known(pair.field_path, pair.text), known(pair.other_path, pair.other))
            if found is not None:
                yield found

    def writers(self) -> list[Input]:
        """Inputs that are language models which write or learn text."""
        return [item for item in self.inputs() if item.wants == ("model",)]

    def scorers(self) -> list[Input]:
        """Inputs that are reward models."""
        return [item for item in self.inputs() if item.wants == ("reward_model",)]

    @property
    def sampled(self) -> tuple[str, Sampling] | None:
        """The field that says how it draws answers, and what it says; None: it draws none."""
        return None

    @property
    def commits_merged(self) -> bool:
        """Whether a whole model is committed next to an adapter."""
        merge: bool = getattr(self, "merge", True)
        return merge

    @property
    def own_tokenizer(self) -> Tokenizer | None:
        """Its own tokenizer; None: its model's."""
        return None

    @property
    def own_architecture(self) -> Architecture | None:
        """Of the model that it builds; None: it starts from one."""
        return None

    def new_heads(self, family: TextFamily | None) -> tuple[str, ...]:
        """What the head may be called that it makes and trains whole; (): its model keeps its own."""
        return ()

    def is_classifier(self, family: TextFamily | None) -> bool:
        """Whether it makes a text classifier of a model of a family."""
        return False

    @property
    def own_template(self) -> Template | None:
        """How its recipe says that plain text is put to its model; None: it does not say."""
        template: Template | None = getattr(self, "template", None)
        return template

    @property
    def counted_tokens(self) -> Literal["responses", "all"]:
        """Which tokens of a row its loss counts."""
        return "responses"

    @abstractmethod
    def text_length(self, use: SourceUse) -> int:
        """Most tokens of a sequence of one of its sources."""


class ImageStage(StageBase):
    """A stage that trains a model of images."""

    def filled_in(self, start: ImageModel, *, is_captioned: bool) -> Self:
        """The stage with what it leaves to the model that it starts from."""
        return self

    def no_checkpointing(self) -> Finding:
        return Finding(Code.NOT_APPLICABLE, "image models do not support gradient checkpointing", "remove the key")

    def no_saved_modules(self, key: str) -> Finding:
        return Finding(Code.NOT_APPLICABLE, "adapters of image models hold nothing else", "remove the key")

    def no_quantised_base(self) -> Finding:
        return Finding(Code.NOT_APPLICABLE, "networks of images are not kept in few bits", "remove the key")

    @property
    def is_image(self) -> bool:
        return True
