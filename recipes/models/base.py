"""What the families of language models share: what an architecture answers, and what is known of a family (pure)."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self, get_args

from recipes.artifact_kinds import OutputKind
from recipes.fields import Strict
from recipes.models.model_kinds import kinds_of
from recipes.models.type_table import Capability, TypeRecord, type_records

Head = Literal["lm", "score", "value"]


@dataclass(frozen=True, slots=True)
class Shape:
    """The numbers that memory and length checks need, under one name for every type."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    positions: int | None
    """Longest sequence in tokens; None: any."""
    tied: bool


@dataclass(frozen=True, slots=True)
class Linear:
    """Linear modules of one place in a network, which an adapter can be put on."""

    name: str
    """What an adapter's `target_modules` names them by."""
    inputs: int
    outputs: int
    count: int = 1
    """How many there are: one a layer."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What a layer of a family keeps of a token for the backward pass: so many times its width, the inner width of its
    feed-forward layer, and the tokens that each of its heads scores.

    On CPUs it is what autograd saves (`tests/contract/recipes/test_kept_values.py`).
    """

    widths: float = 11
    intermediates: float = 4
    scores: float = 0.5
    """Of packed sequences: a block of queries sees the keys before it."""

    def values(self, shape: Shape, length: int) -> int:
        """Of one token in a sequence of `length`."""
        own = self.widths * shape.width + self.intermediates * shape.intermediate
        return int(own + self.scores * shape.heads * length)


KEPT_ON_GPU = Kept(18, 5, 0)
"""An upper estimate; torch's kernels keep no scores."""


def attended_flops(shape: Shape, length: int) -> int:
    """Operations of a token's attention to `length` tokens: a product with keys and one with values a layer."""
    return 4 * shape.layers * shape.heads * shape.head_dim * length


class LanguageArchitecture(Strict):
    """The keys of a language model's configuration, and what follows from them."""

    positions_key: ClassVar[str] = "max_position_embeddings"
    """The key of the longest sequence."""

    @property
    def length_key(self) -> str:
        """The key of the longest sequence."""
        return self.positions_key

    @abstractmethod
    def shape(self) -> Shape:
        """The architecture's numbers under one name for every type."""

    @abstractmethod
    def body_parameters(self, vocab_size: int) -> int:
        """Parameters without a head; the input embedding is among them."""

    def head_parameters(self, vocab_size: int, head: Head) -> int:
        """Parameters that a head adds; a tied embedding is counted with the body."""
        shape = self.shape()
        if head == "lm":
            return 0 if shape.tied else vocab_size * shape.width
        return shape.width + (1 if head == "value" else 0)

    def num_parameters(self, vocab_size: int, head: Head = "lm") -> int:
        """Parameters of the model with one head."""
        return self.body_parameters(vocab_size) + self.head_parameters(vocab_size, head)

    @abstractmethod
    def linears(self) -> list[Linear]:
        """The linear modules that an adapter can be put on, the head excluded."""

    def experts(self) -> list[Linear]:
        """Parameters of experts that are kept in one tensor: a type that has them is counted on the model itself."""
        return []

    def kept_per_token(self, length: int, *, keeps_scores: bool = True) -> int:
        """Values of a token that a layer keeps for the backward pass, in a sequence of `length` tokens.

        `keeps_scores`: whether attention may keep the scores of all pairs of tokens, which torch's GPU kernels do not.
        """
        return (self.kept_shares() if keeps_scores else KEPT_ON_GPU).values(self.shape(), length)

    def kept_shares(self) -> Kept:
        """What a layer keeps of a token on CPUs."""
        return Kept()

    def multiplied_parameters(self) -> int:
        """Parameters that a token is multiplied by on its way through the body: no embeddings, no head."""
        return sum(module.count * module.inputs * module.outputs for module in self.linears())

    def attention_flops(self, length: int) -> int:
        """Operations of a token's attention to `length` tokens: a product with keys and one with values a layer."""
        return attended_flops(self.shape(), length)

    def config_keys(self) -> dict[str, Any]:
        """Keyword arguments of the type's configuration class."""
        return self.model_dump(exclude={"family", "type"})

    @abstractmethod
    def shrunk(self) -> Self:
        """The smoke form."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "LanguageArchitecture | None":
        """The architecture of a `config.json`; None where it lacks a key that is needed.

        It is not validated: sizes need some of the keys, and files of others have values that recipes lack.
        """
        known = {name: config[name] for name in cls.model_fields if name in config and name not in ("family", "type")}
        required = {name for name, field in cls.model_fields.items() if field.is_required()}
        if required - known.keys() - {"family", "type"}:
            return None
        (known["type"],) = get_args(cls.model_fields["type"].annotation)
        return cls.model_construct(**known)

    @classmethod
    def further_parameters(cls, config: Mapping[str, Any]) -> int:
        """Parameters of a `config.json`'s model that the architecture's keys do not tell of."""
        return 0

    @classmethod
    def num_layers_of(cls, config: Mapping[str, Any], stack: str) -> Any:
        """The number of layers of a stack by `config.json`; a stack is known by its path in the files."""
        return config.get("num_hidden_layers")


@dataclass(frozen=True, slots=True)
class ModelType:
    """A `model_type` of configuration files."""

    classes: Mapping[str, OutputKind]
    """Names of its classes, and what a model of each is."""
    architecture: type[LanguageArchitecture] | None = None
    """Its keys; None: only its files are known."""
    linear_modules: tuple[str, ...] = ()
    """Names of its linear modules that an adapter can be put on."""
    headless: str = ""
    """The class whose files hold no head: who trains such a model makes a new one."""
    with_extras: tuple[str, ...] = ()
    """Classes whose files may hold a pooler and a head of sentence pairs, which a masked language model has not."""
    lacks: Mapping[Capability, str] = field(default_factory=dict)
    """What does not work with it, and why."""


def library_types(
    family: str, own: Mapping[str, type[LanguageArchitecture]], rest: type[LanguageArchitecture]
) -> dict[str, ModelType]:
    """transformers' types of a family; `own` are those whose keys have a class here, `rest` is that of the others."""
    return {
        name: _library_type(record, own.get(name, rest))
        for name, record in type_records().items()
        if record.family == family
    }


def _library_type(record: TypeRecord, architecture: type[LanguageArchitecture]) -> ModelType:
    kinds = kinds_of(record.classes)
    classes = {record.classes[kind]: kinds[kind].output for kind in record.classes if kind in kinds}
    headless, with_extras = "", tuple[str, ...]()
    if any(facts.fills_masks for facts in kinds.values()):
        # A backbone alone, and what was pretrained on more than hidden tokens.
        headless = record.classes.get("base", "")
        with_extras = tuple(record.classes[kind] for kind in ("base", "pretraining") if kind in record.classes)
        classes |= dict.fromkeys(with_extras, "model")
    return ModelType(classes, architecture, record.linears, headless, with_extras, record.lacks)


@dataclass(frozen=True)
class TextFamily:
    """What is known of a family of language models wherever it matters which one a model belongs to."""

    name: str
    noun: str
    """As messages name one."""
    types: Mapping[str, ModelType]
    """Its types, by `model_type`."""
    auto_class: str
    """transformers' class that opens one of any type."""
    tuning_role: Literal["instructions", "labels", "seq2seq", "image_text"]
    """What the rows of a fine-tuning are read for."""
    keys: tuple[str, ...] = ()
    """Keys of pretraining and fine-tuning that are for it alone."""
    suites: tuple[str, ...] = ()
    """Suites of an evaluation that measure it."""
    needed_tokens: tuple[str, ...] = ()
    """Special tokens that a tokenizer trained for it must have."""
    pretraining_counts: Literal["tokens", "target_tokens"] = "tokens"
    """What pretraining reports its speed in."""
    is_packed: bool = True
    """Whether several rows share a sequence; else an epoch counts rows alone."""
    takes_few_bits: bool = False
    """Whether adapters learn on a base that is held in few bits."""
    is_recurrent: bool = False
    """Whether it reads text as one stream, with a state that is carried on."""
    continues: bool = False
    """Whether it continues a prompt, so that templates and end tokens matter."""
    reads_captions: bool = False
    """Whether it can be a diffusion's text encoder."""

    @property
    def reads_images(self) -> bool:
        """Whether its rows have images."""
        return self.tuning_role == "image_text"

    @property
    def has_classes(self) -> bool:
        """Whether a fine-tuning makes a classifier of it."""
        return self.tuning_role == "labels"

    @property
    def reads_targets(self) -> bool:
        """Whether a separate decoder reads the targets."""
        return self.tuning_role == "seq2seq"

    @property
    def plural(self) -> str:
        """As messages name several."""
        return f"{self.noun.partition(' ')[2]}s"

    @property
    def is_built_here(self) -> bool:
        """Whether a recipe can build one; else it comes from outside and is tuned alone."""
        return any(known.architecture is not None for known in self.types.values())

    @property
    def makes_reward_models(self) -> bool:
        """Whether it can be given a head for scores, and so take part in reinforcement learning."""
        return any("reward_model" in known.classes.values() for known in self.types.values())

    @property
    def takes_adapters(self) -> bool:
        """Whether it has linear modules for an adapter."""
        return any(known.linear_modules for known in self.types.values())
