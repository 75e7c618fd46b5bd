"""Encoder-decoder models: the keys of their configuration, and what is hidden in pretraining."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from recipes.fields import Strict, meaning, require_divides
from recipes.models.base import Head, Kept, LanguageArchitecture, Linear, Shape, TextFamily, library_types
from recipes.models.library import LibraryArchitecture, type_names
from recipes.smoke_sizes import HEADS, INTERMEDIATE, POSITIONS, WIDTH


class _EncoderDecoder(LanguageArchitecture):
    """What the types share: source, target and output have one embedding."""

    biases: ClassVar[int]
    """Biases of each output of a linear module: one or none."""

    def body_parameters(self, vocab_size: int) -> int:
        """Parameters without a head; the tied one is the embedding's."""
        linear = sum(module.count * (module.inputs + self.biases) * module.outputs for module in self.linears())
        return vocab_size * self.shape().width + linear + self._further_in_body()

    def head_parameters(self, vocab_size: int, head: Head) -> int:
        """Parameters that a head adds; these types make no scalar one here, so it is counted as a column."""
        return {"lm": 0, "score": self.shape().width, "value": self.shape().width + 1}[head]

    @abstractmethod
    def _further_in_body(self) -> int:
        """Parameters of norms and positions."""

    def attention_flops(self, length: int) -> int:
        """Operations of attention to `length` tokens; the decoder attends twice."""
        queries = self.linears()[0]
        return 4 * queries.count * queries.outputs * length


class T5(_EncoderDecoder):
    """transformers' T5Config (Raffel et al. 2020): relative positions, norms before each part, no biases."""

    biases: ClassVar[int] = 0
    family: Literal["encoder_decoder"] = meaning(description="Encoder-decoder transformer.")
    type: Literal["t5"] = meaning(description="transformers' model_type.")
    d_model: int = meaning(ge=8, le=65_536, description="Width of the residual stream.")
    d_kv: int = meaning(ge=2, le=1024, description="Width of an attention head.")
    d_ff: int = meaning(ge=8, le=1_048_576, description="Width of the feed-forward layer.")
    num_layers: int = meaning(ge=1, le=512, description="Blocks of the encoder.")
    num_decoder_layers: int | None = meaning(
        None, ge=1, le=512, description="Blocks of the decoder; null: as many as the encoder's."
    )
    num_heads: int = meaning(ge=1, le=1024, description="Attention heads of d_kv each.")
    relative_attention_num_buckets: int = meaning(32, ge=4, le=4096, description="Distances that are distinguished.")
    relative_attention_max_distance: int = meaning(
        128, ge=8, le=10**6, description="Distance in tokens from which on all are the same."
    )
    dropout_rate: float = meaning(0.1, ge=0, lt=1, description="Dropout everywhere, attention weights included.")
    layer_norm_epsilon: float = meaning(1e-6, gt=0, le=1, description="Added to the variance in the norms.")
    initializer_factor: float = meaning(
        1.0, gt=0, le=100, description="Factor on T5's initial deviations; that of the embeddings is 1."
    )
    feed_forward_proj: Literal["relu", "gelu", "gated-gelu", "gated-silu"] = meaning(
        "relu", description="Activation of the feed-forward layer; gated ones have a second input projection."
    )

    @property
    def decoder_layers(self) -> int:
        """Blocks of the decoder."""
        return self.num_decoder_layers or self.num_layers

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward layer has two input projections."""
        return self.feed_forward_proj.startswith("gated-")

    def shape(self) -> Shape:
        """The architecture's numbers under one name for every type."""
        return Shape(
            layers=self.num_layers + self.decoder_layers,
            width=self.d_model,
            heads=self.num_heads,
            kv_heads=self.num_heads,
            head_dim=self.d_kv,
            intermediate=self.d_ff,
            positions=None,
            tied=True,
        )

    def kept_shares(self) -> Kept:
        """What a layer keeps of a token, cross-attention included: scores have a bias, and their dropout."""
        inner = 4 if self.is_gated else 1 if self.feed_forward_proj == "relu" else 2
        return Kept(15, inner, 3 if self.dropout_rate else 1)

    def _further_in_body(self) -> int:
        """Norms, and the biases of relative positions."""
        norms = 2 * self.num_layers + 3 * self.decoder_layers + 2
        return norms * self.d_model + 2 * self.relative_attention_num_buckets * self.num_heads

    def linears(self) -> list[Linear]:
        """The linear modules that an adapter can be put on; the decoder attends twice."""
        width, inner, wide = self.d_model, self.num_heads * self.d_kv, self.d_ff
        attention = {"q": (width, inner), "k": (width, inner), "v": (width, inner), "o": (inner, width)}
        inputs = ("wi_0", "wi_1") if self.is_gated else ("wi",)
        feed_forward = {**dict.fromkeys(inputs, (width, wide)), "wo": (wide, width)}
        attentions, layers = self.num_layers + 2 * self.decoder_layers, self.num_layers + self.decoder_layers
        return [
            *(Linear(name, *size, attentions) for name, size in attention.items()),
            *(Linear(name, *size, layers) for name, size in feed_forward.items()),
        ]

    @classmethod
    def further_parameters(cls, config: Mapping[str, Any]) -> int:
        """A head that is not the embedding, as in files of T5 1.1."""
        is_tied = config.get("tie_word_embeddings") is not False
        return 0 if is_tied else int(config["vocab_size"]) * int(config["d_model"])

    @classmethod
    def num_layers_of(cls, config: Mapping[str, Any], stack: str) -> Any:
        """The number of layers of a stack by `config.json`; a stack is known by its path in the files."""
        decoder = config.get("num_decoder_layers") if stack.startswith("decoder") else None
        return decoder or config.get("num_layers")

    def shrunk(self) -> Self:
        """The smoke form."""
        return self.changed(
            num_layers=1,
            num_decoder_layers=1,
            d_model=WIDTH,
            d_kv=WIDTH // HEADS,
            d_ff=INTERMEDIATE,
            num_heads=HEADS,
        )


class Bart(_EncoderDecoder):
    """transformers' BartConfig (Lewis et al. 2020): learned positions, norms after each part, biases."""

    biases: ClassVar[int] = 1
    family: Literal["encoder_decoder"] = meaning(description="Encoder-decoder transformer.")
    type: Literal["bart"] = meaning(description="transformers' model_type.")
    d_model: int = meaning(ge=8, le=65_536, description="Width of the residual stream.")
    encoder_layers: int = meaning(ge=1, le=512, description="Blocks of the encoder.")
    decoder_layers: int = meaning(ge=1, le=512, description="Blocks of the decoder.")
    encoder_attention_heads: int = meaning(ge=1, le=1024, description="Heads of the encoder; must divide d_model.")
    decoder_attention_heads: int = meaning(ge=1, le=1024, description="Heads of the decoder; must divide d_model.")
    encoder_ffn_dim: int = meaning(ge=8, le=1_048_576, description="Width of the encoder's feed-forward layer.")
    decoder_ffn_dim: int = meaning(ge=8, le=1_048_576, description="Width of the decoder's feed-forward layer.")
    activation_function: Literal["gelu", "gelu_new", "relu", "silu"] = meaning(
        "gelu", description="Activation of the feed-forward layers."
    )
    max_position_embeddings: int = meaning(1024, ge=8, le=10**7, description="Longest source and target in tokens.")
    dropout: float = meaning(0.1, ge=0, lt=1, description="Dropout on embeddings and residual branches.")
    attention_dropout: float = meaning(0.0, ge=0, lt=1, description="Dropout on attention weights.")
    activation_dropout: float = meaning(0.0, ge=0, lt=1, description="Dropout inside of the feed-forward layers.")
    init_std: float = meaning(0.02, gt=0, le=1, description="Standard deviation of the initial weights.")
    scale_embedding: bool = meaning(False, description="Multiply embeddings by the square root of d_model.")
    tie_word_embeddings: Literal[True] = meaning(
        True, description="Source, target and output share one embedding; this type has no other form."
    )

    @model_validator(mode="after")
    def _heads_fit(self) -> "Bart":
        require_divides(self, "encoder_attention_heads", "d_model")
        require_divides(self, "decoder_attention_heads", "d_model")
        return self

    def shape(self) -> Shape:
        """The architecture's numbers under one name for every type; of encoder and decoder the larger."""
        heads = max(self.encoder_attention_heads, self.decoder_attention_heads)
        return Shape(
            layers=self.encoder_layers + self.decoder_layers,
            width=self.d_model,
            heads=heads,
            kv_heads=heads,
            head_dim=self.d_model // heads,
            intermediate=max(self.encoder_ffn_dim, self.decoder_ffn_dim),
            positions=self.max_position_embeddings,
            tied=True,
        )

    def kept_shares(self) -> Kept:
        """What a layer keeps of a token, cross-attention included: scores only for their dropout."""
        return Kept(14 if self.dropout else 12, 2, 3 if self.attention_dropout else 0)

    def _further_in_body(self) -> int:
        """Norms with biases, and learned positions: two more than tokens, of source and target each."""
        norms = 2 * self.encoder_layers + 3 * self.decoder_layers + 2
        return 2 * (self.max_position_embeddings + 2) * self.d_model + norms * 2 * self.d_model

    def linears(self) -> list[Linear]:
        """The linear modules that an adapter can be put on; the decoder attends twice."""
        width, attentions = self.d_model, self.encoder_layers + 2 * self.decoder_layers
        return [
            *(Linear(name, width, width, attentions) for name in ("q_proj", "k_proj", "v_proj", "out_proj")),
            *self._feed_forward(self.encoder_layers, self.encoder_ffn_dim),
            *self._feed_forward(self.decoder_layers, self.decoder_ffn_dim),
        ]

    def _feed_forward(self, layers: int, wide: int) -> Iterator[Linear]:
        yield Linear("fc1", self.d_model, wide, layers)
        yield Linear("fc2", wide, self.d_model, layers)

    @classmethod
    def num_layers_of(cls, config: Mapping[str, Any], stack: str) -> Any:
        """The number of layers of a stack by `config.json`; a stack is known by its path in the files."""
        return config.get(f"{'decoder' if 'decoder' in stack else 'encoder'}_layers")

    def shrunk(self) -> Self:
        """The smoke form."""
        return self.changed(
            encoder_layers=1,
            decoder_layers=1,
            d_model=WIDTH,
            encoder_ffn_dim=INTERMEDIATE,
            decoder_ffn_dim=INTERMEDIATE,
            encoder_attention_heads=HEADS,
            decoder_attention_heads=HEADS,
            max_position_embeddings=POSITIONS,
        )


class SpanCorruption(Strict):
    """What is hidden from an encoder-decoder in pretraining (Raffel et al. 2020, section 3.1.4)."""

    noise_density: float = meaning(0.15, gt=0, lt=1, description="Share of a sequence's tokens that are hidden.")
    mean_span_length: float = meaning(3.0, ge=1, le=1000, description="Mean length of a hidden span in tokens.")

    def num_noise_tokens(self, length: int) -> int:
        """Tokens that are hidden of so many: at least one and never all; none of fewer than two."""
        return 0 if length < 2 else min(max(round(length * self.noise_density), 1), length - 1)

    def num_spans(self, length: int) -> int:
        """Hidden spans of so many tokens; each follows at least one token that is shown."""
        hidden = self.num_noise_tokens(length)
        return min(max(round(hidden / self.mean_span_length), 1), length - hidden) if hidden else 0


class AnyEncoderDecoder(LibraryArchitecture):
    """Any other encoder-decoder of texts of transformers; its keys are those of the type's own configuration."""

    family: Literal["encoder_decoder"] = meaning(description="Encoder-decoder transformer.")
    type: type_names("encoder_decoder", without=("t5", "bart")) = meaning(  # type: ignore[valid-type]
        description="transformers' model_type."
    )


ENCODER_DECODER = TextFamily(
    name="encoder_decoder",
    noun="an encoder-decoder",
    types=library_types("encoder_decoder", {"t5": T5, "bart": Bart}, AnyEncoderDecoder),
    auto_class="AutoModelForSeq2SeqLM",
    tuning_role="seq2seq",
    keys=("span_corruption", "num_beams"),
    suites=("targets",),
    is_packed=False,
)
