"""The size of a language model from outside the recipe, by its `config.json` alone (pure)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from recipes.models.architecture import TYPES
from recipes.models.base import KEPT_ON_GPU, Head, Kept, LanguageArchitecture, Linear, Shape, attended_flops
from recipes.models.decoder import Llama
from recipes.models.vision_language import tower_parameters


class SizedModel(Protocol):
    """What a stage's memory is predicted from: parameters, and the values that a sample keeps, of text or of images."""

    @property
    def vocab_size(self) -> int:
        """Size of its vocabulary; 0: it makes no logits."""

    @property
    def fixed_parameters(self) -> int:
        """Parameters of other models that it works with and leaves as they are."""

    @property
    def largest_tensor(self) -> int:
        """Elements of its largest tensor."""

    @property
    def width(self) -> int:
        """Inputs of a head."""

    @property
    def keeps_average(self) -> bool:
        """Whether a moving average of its weights is kept."""

    def num_parameters(self, head: Head = "lm") -> int:
        """Parameters with one head."""

    @property
    def end(self) -> Linear | None:
        """The sizes of its embedding, which are those of its head; None: it has neither."""

    @property
    def is_tied(self) -> bool:
        """Whether embedding and head are one tensor."""

    def linears(self) -> Sequence[Linear]:
        """The linear modules that an adapter can be put on."""

    def experts(self) -> Sequence[Linear]:
        """Parameters of experts that are kept in one tensor, by module and parameter."""

    def positions(self, length: int) -> int:
        """Vectors that a linear module takes of one sample of `length` tokens, or of an image."""

    def sample_values(self, length: int) -> int:
        """Values of a sample itself."""

    def kept(self, length: int, *, keeps_scores: bool, recomputes: bool) -> int:
        """Values that one sample keeps for the backward pass.

        `keeps_scores`: of every pair of tokens, which torch's kernels on GPUs do not; `recomputes`: of one layer alone.
        """

    def cached(self, length: int) -> int:
        """Keys and values of a sample while it is written."""


class Sized(Protocol):
    """What a language model's sizes are predicted from: an architecture's formulas, or what was counted on a model."""

    def shape(self) -> Shape:
        """The numbers that memory and length checks need."""

    def num_parameters(self, vocab_size: int, head: Head = "lm") -> int:
        """Parameters of the model with one head."""

    def linears(self) -> Sequence[Linear]:
        """The linear modules that an adapter can be put on, the head excluded."""

    def experts(self) -> Sequence[Linear]:
        """Parameters of experts that are kept in one tensor, by module and parameter (`experts.down_proj`)."""

    def kept_per_token(self, length: int, *, keeps_scores: bool = True) -> int:
        """Values of a token that a layer keeps for the backward pass, in a sequence of `length` tokens."""

    def multiplied_parameters(self) -> int:
        """Parameters that a token is multiplied by on its way through the body: no embeddings, no head."""

    def attention_flops(self, length: int) -> int:
        """Operations of a token's attention to `length` tokens."""


@dataclass(frozen=True, slots=True)
class CountedSizes:
    """A model that was counted tensor by tensor, with the vocabulary that it was counted with."""

    known_shape: Shape
    full: int
    body: int
    """Parameters without a head; a tied embedding is among them."""
    multiplied: int
    known_linears: tuple[Linear, ...]
    known_experts: tuple[Linear, ...] = ()

    def shape(self) -> Shape:
        """The numbers that memory and length checks need."""
        return self.known_shape

    def num_parameters(self, vocab_size: int, head: Head = "lm") -> int:
        """Parameters of the model with one head."""
        return self.full if head == "lm" else self.body + self.known_shape.width + (1 if head == "value" else 0)

    def linears(self) -> Sequence[Linear]:
        """The linear modules that an adapter can be put on, the head excluded."""
        return self.known_linears

    def experts(self) -> Sequence[Linear]:
        """Parameters of experts that are kept in one tensor, by module and parameter."""
        return self.known_experts

    def kept_per_token(self, length: int, *, keeps_scores: bool = True) -> int:
        """Values of a token that a layer keeps for the backward pass, in a sequence of `length` tokens."""
        return (Kept() if keeps_scores else KEPT_ON_GPU).values(self.known_shape, length)

    def multiplied_parameters(self) -> int:
        """Parameters that a token is multiplied by on its way through the body: of its experts those that it takes."""
        return self.multiplied

    def attention_flops(self, length: int) -> int:
        """Operations of a token's attention to `length` tokens."""
        return attended_flops(self.known_shape, length)


@dataclass(frozen=True, slots=True)
class KnownModel:
    """What sizes are predicted from."""

    architecture: Sized
    vocab_size: int
    further_parameters: int = 0
    """Beyond those that the architecture's keys give: a head that is not the embedding, a vision tower."""

    fixed_parameters: ClassVar[int] = 0
    keeps_average: ClassVar[bool] = False

    @property
    def width(self) -> int:
        """Width of the residual stream."""
        return self.architecture.shape().width

    @property
    def largest_tensor(self) -> int:
        """Elements of the embedding."""
        return self.vocab_size * self.width

    def num_parameters(self, head: Head = "lm") -> int:
        """Parameters with one head."""
        found = self.architecture.num_parameters(self.vocab_size, head)
        return found + (self.further_parameters if head == "lm" else 0)

    @property
    def end(self) -> Linear:
        """The sizes of its embedding, which are those of its head."""
        return Linear("", self.vocab_size, self.width)

    @property
    def is_tied(self) -> bool:
        """Whether embedding and head are one tensor."""
        return self.architecture.shape().tied

    def linears(self) -> Sequence[Linear]:
        """The linear modules that an adapter can be put on, the head excluded."""
        return self.architecture.linears()

    def experts(self) -> Sequence[Linear]:
        """Parameters of experts that are kept in one tensor, by module and parameter."""
        return self.architecture.experts()

    def positions(self, length: int) -> int:
        """One for each token."""
        return length

    def sample_values(self, length: int) -> int:
        """Its tokens."""
        return length

    def kept(self, length: int, *, keeps_scores: bool, recomputes: bool) -> int:
        """Values of all layers, or of one and the inputs of each; and one layer's gradients."""
        shape = self.architecture.shape()
        layers = 1 if recomputes else shape.layers
        per_token = self.architecture.kept_per_token(length, keeps_scores=keeps_scores)
        return length * ((layers + 1) * per_token + (shape.layers * shape.width if recomputes else 0))

    def cached(self, length: int) -> int:
        """Keys and values of its tokens in every layer."""
        shape = self.architecture.shape()
        return 2 * length * shape.layers * shape.kv_heads * shape.head_dim


def known_model(config: Mapping[str, Any]) -> KnownModel | None:
    """The model of a configuration file; None for a type that is not counted, or where a number is missing."""
    try:
        if config.get("model_type") == "llava":
            text = _text_model(config["text_config"])
            if text is None:
                return None
            further = text.further_parameters + tower_parameters(config)
            return KnownModel(text.architecture, text.vocab_size, further)
        return _text_model(config)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None


def _text_model(config: Mapping[str, Any]) -> KnownModel | None:
    kind, further = config.get("model_type"), 0
    if kind == "qwen2":  # within vision-language models alone: llama, with biases of queries, keys and values
        known: type[LanguageArchitecture] | None = Llama
        heads = int(config["num_attention_heads"])
        read = heads + 2 * int(config.get("num_key_value_heads") or heads)
        width = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
        further = int(config["num_hidden_layers"]) * read * width
    else:
        known = TYPES[kind].architecture if kind in TYPES else None
    architecture = None if known is None else known.from_config(config)
    if known is None or architecture is None:
        return None
    return KnownModel(architecture, int(config["vocab_size"]), further + known.further_parameters(config))
