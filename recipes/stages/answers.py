"""What a stage answers with when it is asked: values, and the fields and rules that kinds of stage share."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, cast

from recipes.artifact_kinds import OutputKind
from recipes.data.images import ImageSource
from recipes.data.text import Mix, PlainSource, Source
from recipes.errors import FieldFinding, Finding, at
from recipes.fields import added_meaning
from recipes.models.base import TextFamily
from recipes.problem_codes import Code

Template = Literal["chat", "none"]
"""How rows of plain text are put to a model: as turns of its chat template, or as they are."""
Role = Literal["text", "instructions", "labels", "seq2seq", "preferences", "judged", "prompts", "cases", "images"]
"""What the rows of a source are for."""


@dataclass(frozen=True, slots=True)
class RoleFacts:
    """What is known of a role wherever it matters which one rows have."""

    has_turns: bool = False
    """Whether rows are prompts and answers, which are put to a model by its chat template."""
    is_tuning: bool = False
    """Whether the family of the model says what its rows are: its `tuning_role`."""
    is_plain: bool = False
    """Whether a row is one text, whatever it is made of."""
    is_images: bool = False
    is_asked: bool = False
    """Whether rows are prompts for the model to answer."""
    is_only_read: bool = False
    """Whether no token of a row is a target."""
    has_pairs: bool = False
    has_targets: bool = False
    """Whether a decoder reads the answers apart from the prompts."""
    sides: tuple[str, ...] = ("",)
    """The sequences that a row becomes; without a name where it is one."""


ROLES: dict[str, RoleFacts] = {
    "text": RoleFacts(is_plain=True),
    "instructions": RoleFacts(has_turns=True, is_tuning=True),
    "image_text": RoleFacts(),
    "labels": RoleFacts(is_only_read=True),
    "seq2seq": RoleFacts(has_targets=True, sides=("source", "target")),
    "preferences": RoleFacts(has_turns=True, has_pairs=True, sides=("chosen", "rejected")),
    "judged": RoleFacts(has_turns=True),
    "prompts": RoleFacts(has_turns=True, is_asked=True, is_only_read=True),
    "cases": RoleFacts(is_only_read=True),
    "images": RoleFacts(is_images=True),
}
"""By role, and by the `tuning_role` of families."""


INPUT_FIELDS = (
    "init_from", "tokenizer", "autoencoder", "text_encoder", "actor", "reward", "rewards", "suites", "of", "features",
)  # fmt: skip
"""Fields that a stage's `inputs()` and `text_start()` read, of any kind of stage."""
SOURCE_FIELDS = ("data", "evaluation", "prompts", "text", "images", "suites", "benchmarks", "rewards")
"""Fields that a stage's `sources()` reads, of any kind of stage."""


@dataclass(frozen=True, slots=True)
class Input:
    """One input of a stage: its field, what is written there, and which kinds of output fit."""

    field_path: str
    text: str
    wants: tuple[OutputKind, ...]


class CaseForm(Protocol):
    """What makes cases of a benchmark's rows, each after its name."""

    def cases(self, rows: Iterable[tuple[str, Mapping[str, Any]]]) -> Iterable[tuple[int, Any]]:
        """Cases by the place of their first row; None: a row is missing. Raises ValueError for a wrong one."""

    def shown(self, row: tuple[str, Mapping[str, Any]]) -> tuple[str, str]:
        """What a model reads of a row, and what it is to say."""

    def reading(self) -> dict[str, Any]:
        """Settings that decide what the cases are."""


@dataclass(frozen=True, slots=True)
class SourceUse:
    """One data source of a stage: its field, what its rows are for, and the source with its default filled in."""

    field_path: str
    source: Source | ImageSource
    role: Role
    held_out: bool = False
    """Whether rows are taken from the source's held-out share (`hold_out`) instead of the rest."""
    is_derived: bool = False
    """Whether no field of the recipe names the source: it follows from the training rows'."""
    carried: tuple[str, ...] = ()
    """Columns of the rows that what judges answers reads, where the rows are prompts or cases."""
    form: "CaseForm | None" = None
    """Of cases: what makes them of rows."""

    @property
    def facts(self) -> RoleFacts:
        """What is known of its role."""
        return ROLES[self.role]

    def members(self) -> "list[SourceUse]":
        """The use of each source that its own is made of."""
        return [use for use, _ in self.named_members()]

    def named_members(self) -> "list[tuple[SourceUse, str]]":
        """The same with the sources' names in a mixture."""
        found = []
        shared = (self.source.filter or []) if isinstance(self.source, Mix) else []
        for member in self.source.members():
            held_out = self.held_out and (member.source.hold_out > 0 or not member.name)
            field_path = f"{self.field_path}.{member.field}".removesuffix(".")
            source = member.source
            if shared and not isinstance(source, Mix):
                source = source.changed(filter=[*(getattr(source, "filter", None) or []), *shared])
            found.append((replace(self, field_path=field_path, source=source, held_out=held_out), member.name))
        return found

    @property
    def plain(self) -> PlainSource:
        """The source of a use of text that is no mixture, as those of `members` are."""
        assert not isinstance(self.rows, Mix)
        return self.rows

    @property
    def rows(self) -> Source:
        """The source of a use of text."""
        assert not self.facts.is_images, f"{self.field_path} is a source of images"
        return cast(Source, self.source)

    @property
    def images(self) -> ImageSource:
        """The source of a use of images."""
        assert self.facts.is_images, f"{self.field_path} is no source of images"
        return cast(ImageSource, self.source)


Counted = Literal["tokens", "target_tokens", "rows", "pairs", "responses", "images"]
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
class TokenizerId:
    """Which tokenizer a model has: its content, or where it is not there yet, what it is made from."""

    known: object
    """Equal for equal tokenizers."""
    origin: str
    """Where it comes from, in words."""


@dataclass(frozen=True, slots=True)
class Labelling:
    """How people judge the pairs of a stage, while its run waits without workers."""

    annotators: tuple[str, ...]
    twice: float
    """Share of the pairs that two of them judge."""
    labels: int | None
    """How many the run waits for; None: for all."""
    min_kappa: float | None
    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Cadence:
    """How often things happen in a training, in steps."""

    save_every: int
    evaluate_every: int
    max_skipped_steps: int = 3


@dataclass(frozen=True, slots=True)
class SharedTokens:
    """A model whose tokenizer has to be that of another one."""

    field_path: str
    text: str
    other_path: str
    """Field of the other one."""
    other: str
    """What is written there."""
    advice: str = ""
    """What else would do."""

    def rule(self, own: TokenizerId | None, other: TokenizerId | None) -> FieldFinding | None:
        """What is wrong where both are known and differ."""
        if own is None or other is None or own.known == other.known:
            return None
        origins = f"theirs come from {own.origin} and {other.origin}"
        message = f"{self.text} and {self.other} do not share a tokenizer: {origins}"
        return at(self.field_path, self.text, Code.TOKENIZER_MISMATCH, message, f"build both on one model{self.advice}")


@dataclass(frozen=True, slots=True)
class TextFacts:
    """What is known of the language model that a stage builds or starts from."""

    family: TextFamily | None = None
    special_tokens: Collection[str] | None = None
    """Of its tokenizer."""
    is_classifier: bool = False
    """Whether it is a text classifier already."""
    image_tokens: int | None = None
    """Tokens that an image takes of a vision-language model."""
    type: str | None = None
    """Its `model_type`."""


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
    """Of the stage's adapter, with the modules that learn whole; 0: it has none."""
    width: int
    fixed: int = 0
    """Of other models that it works with and leaves as they are."""
    saved: int = 0
    """Of the modules that learn whole next to the adapter."""

    @property
    def frozen(self) -> int:
        """What an adapter leaves as it is, of the model with the head that predicts tokens."""
        return self.full - self.saved


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
    scored: int = 1
    """Of a sample's sequences those whose logits are there at once."""
    has_cache: bool = False
    """Whether keys and values are cached while answers are written."""
    has_backward: bool = True
    waiting: int = 0
    """Samples that all workers keep until they have been learnt from."""


@dataclass(frozen=True, slots=True)
class Pass:
    """Samples that a stage puts through one of its models, of all workers together."""

    samples: int
    """Sequences, or images."""
    length: int = 1
    """Tokens of a sequence at most."""
    times: float = 1
    """How often in the whole stage."""
    logits: int = 0
    """Tokens of a sequence whose logits are taken."""
    trains: bool = False
    """Whether a backward pass follows."""
    writes: int = 0
    """Tokens of a sequence that are written one after the other."""


def template_field(rows: str) -> Any:
    """The field `template` of a stage that reads such rows."""
    return added_meaning(
        None,
        description=f"How {rows} of plain text are put to the model: chat, as the user's and the assistant's turns in "
        "its chat template; none, as they are, one after the other. null: chat where a decoder or rnn has a template. "
        "Rows of messages always take the template.",
    )


def default_template(role: Role, has_chat_template: bool) -> Template:
    """How plain text of the role is put to a model where the recipe does not say."""
    return "chat" if has_chat_template and ROLES[role].has_turns else "none"


def template_rule(template: Template | None, has_chat_template: bool) -> Finding | None:
    """What is wrong with how a stage puts plain text to a model whose tokenizer has a chat template, or none."""
    if template != "chat" or has_chat_template:
        return None
    advice = "template: none, or tokenizer.chat_template where it is made"
    return Finding(Code.MISSING_CHAT_TEMPLATE, "the model's tokenizer has no chat template", advice)


def held_out_use(field_path: str, source: Source | ImageSource, role: Role) -> SourceUse:
    """An evaluation reads what `hold_out` keeps away from training; of a source without it every row."""
    return SourceUse(field_path, source, role, held_out=source.hold_out > 0)


def needs_decoder(kind: str, family: TextFamily | None) -> Finding | None:
    """The rule of a kind of stage that works with decoders alone."""
    if family is None or family.makes_reward_models:
        return None
    return Finding(Code.UNSUPPORTED_FAMILY, f"kind: {kind} needs a decoder; this model is {family.noun}")
