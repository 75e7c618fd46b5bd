"""Encoder-decoder models: the keys of their configuration, and what is hidden in pretraining."""

from collections.abc import Collection
from itertools import count
from typing import Literal, Self

from pydantic import model_validator

from recipes.fields import Strict, meaning, require_divides
from recipes.smoke_sizes import HEADS, INTERMEDIATE, POSITIONS, WIDTH

SENTINEL = "<extra_id_{}>"
"""T5's name of the token that stands for the n-th hidden span."""


def count_sentinels(tokens: Collection[str]) -> int:
    """Sentinels among the tokens, counted from the first until one is missing."""
    return next(number for number in count() if SENTINEL.format(number) not in tokens)


class T5(Strict):
    """transformers' T5Config (Raffel et al. 2020): relative positions, norms before each part, no biases."""

    family: Literal["encoder_decoder"] = meaning(description="Encoder-decoder transformer.")
    type: Literal["t5"] = meaning(description="transformers' model_type.")
    d_model: int = meaning(ge=8, le=65_536, description="Width of the residual stream.")
    d_kv: int = meaning(ge=2, le=1024, description="Width of an attention head.")
    d_ff: int = meaning(ge=8, le=1_048_576, description="Width of the feed-forward layer.")
    num_layers: int = meaning(ge=1, le=512, description="Blocks of the encoder.")
    num_decoder_layers: int | None = meaning(
        None, ge=1, le=512, description="Blocks of the decoder; None: as many as the encoder's."
    )
    num_heads: int = meaning(ge=1, le=1024, description="Attention heads of d_kv each.")
    relative_attention_num_buckets: int = meaning(32, ge=4, le=4096, description="Distances that are told apart.")
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


class Bart(Strict):
    """transformers' BartConfig (Lewis et al. 2020): learned positions, norms after each part, biases."""

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
