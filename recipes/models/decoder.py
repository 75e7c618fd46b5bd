"""Decoder-only language models: transformers' own configuration keys.

A contract test compares every class with the pinned library. Left out on purpose, here and in the other families:
`vocab_size` and the special token ids (they follow from the tokenizer), and keys that change no weight and no output
(`use_cache`, `pretraining_tp`, `summary_*`, ...).
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from recipes.fields import Strict, meaning, refuse, require_divides
from recipes.models.base import Kept, LanguageArchitecture, Linear, Shape, TextFamily, library_types
from recipes.models.library import LibraryArchitecture, type_names
from recipes.problem_codes import Code
from recipes.smoke_sizes import HEADS, INTERMEDIATE, LAYERS, POSITIONS, WIDTH

Activation = Literal["silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu"]
ROTARY_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Linear modules of a block of the llama and qwen3 types."""


class RopeParameters(Strict):
    """Rotary position embedding (Su et al. 2021) and its context extensions."""

    rope_type: Literal["default", "linear", "llama3"] = meaning(
        "default", description="Frequency scaling; default: none."
    )
    rope_theta: float = meaning(
        10_000.0, gt=1, le=1e9, description="Base of the frequencies; larger for longer contexts."
    )
    factor: float | None = meaning(
        None, ge=1, le=1e4, description="Context extension factor (linear and llama3 need it)."
    )
    low_freq_factor: float | None = meaning(None, gt=0, le=1e4, description="llama3: where the low frequencies end.")
    high_freq_factor: float | None = meaning(
        None, gt=0, le=1e4, description="llama3: where the high frequencies start."
    )
    original_max_position_embeddings: int | None = meaning(
        None, ge=8, le=10**7, description="llama3: context length in tokens before the extension."
    )

    @model_validator(mode="after")
    def _keys_of_the_type(self) -> "RopeParameters":
        extra = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        needed = {"default": (), "linear": ("factor",), "llama3": ("factor", *extra)}[self.rope_type]
        for key in ("factor", *extra):
            given = getattr(self, key) is not None
            if given != (key in needed):
                code = Code.NOT_APPLICABLE if given else Code.MISSING_KEY
                message = f"rope_type {self.rope_type!r} {'takes no' if given else 'needs'} {key}"
                refuse(code, message)
        return self


class _Rotary(LanguageArchitecture):
    """Keys that the llama and qwen3 types share."""

    hidden_size: int = meaning(ge=8, le=65_536, description="Width of the residual stream.")
    intermediate_size: int = meaning(ge=8, le=1_048_576, description="Width of the gated feed-forward layer.")
    num_hidden_layers: int = meaning(ge=1, le=512, description="Transformer blocks.")
    num_attention_heads: int = meaning(ge=1, le=1024, description="Query heads.")
    num_key_value_heads: int | None = meaning(
        None,
        ge=1,
        le=1024,
        description="Key and value heads; must divide the query heads; null: one for each query head.",
    )
    head_dim: int | None = meaning(
        None, ge=2, le=1024, multiple_of=2, description="Width of a head; null: hidden_size / num_attention_heads."
    )
    hidden_act: Activation = meaning("silu", description="Activation of the feed-forward layer.")
    max_position_embeddings: int = meaning(2048, ge=8, le=10**7, description="Longest sequence in tokens.")
    initializer_range: float = meaning(0.02, gt=0, le=1, description="Standard deviation of the initial weights.")
    rms_norm_eps: float = meaning(1e-6, gt=0, le=1, description="Added to the variance in the norms.")
    rope_parameters: RopeParameters = meaning(default_factory=RopeParameters, description="Rotary position embedding.")
    attention_bias: bool = meaning(False, description="Biases in the attention projections.")
    attention_dropout: float = meaning(0.0, ge=0, lt=1, description="Dropout on attention weights; always off in RLHF.")
    tie_word_embeddings: bool = meaning(False, description="Share the input and the output embedding.")

    @model_validator(mode="after")
    def _heads_fit(self) -> "_Rotary":
        if self.head_dim is None:
            require_divides(self, "num_attention_heads", "hidden_size")
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if kv_heads is not None and heads % kv_heads:
            refuse(Code.NOT_DIVISIBLE, f"num_key_value_heads ({kv_heads}) must divide num_attention_heads ({heads})")
        if self.head_dim is None and (self.hidden_size // self.num_attention_heads) % 2:
            refuse(
                Code.NOT_DIVISIBLE,
                f"hidden_size / num_attention_heads ({self.hidden_size} / {self.num_attention_heads}) must be even "
                "for rotary position embeddings",
            )
        return self

    def shape(self) -> Shape:
        """The architecture's numbers under one name for every type."""
        return Shape(
            layers=self.num_hidden_layers,
            width=self.hidden_size,
            heads=self.num_attention_heads,
            kv_heads=self.num_key_value_heads or self.num_attention_heads,
            head_dim=self.head_dim or self.hidden_size // self.num_attention_heads,
            intermediate=self.intermediate_size,
            positions=self.max_position_embeddings,
            tied=self.tie_word_embeddings,
        )

    def body_parameters(self, vocab_size: int) -> int:
        """Parameters without a head."""
        shape = self.shape()
        inner, inner_kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        attention = shape.width * (2 * inner + 2 * inner_kv)
        if self.attention_bias:
            attention += inner + 2 * inner_kv + shape.width
        block = attention + 3 * shape.width * shape.intermediate + 2 * shape.width + self._further_in_block(shape)
        return vocab_size * shape.width + shape.layers * block + shape.width

    def _further_in_block(self, shape: Shape) -> int:
        """Parameters of a block that only this type has."""
        return 0

    def linears(self) -> list[Linear]:
        """The linear modules that an adapter can be put on."""
        shape = self.shape()
        width, inner, inner_kv = shape.width, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        attention = ((width, inner), (width, inner_kv), (width, inner_kv), (inner, width))
        feed_forward = ((width, shape.intermediate), (width, shape.intermediate), (shape.intermediate, width))
        sizes = (*attention, *feed_forward)
        return [Linear(name, *size, shape.layers) for name, size in zip(ROTARY_MODULES, sizes, strict=True)]

    def config_keys(self) -> dict[str, Any]:
        """Keyword arguments of the type's configuration class, every derived value written out."""
        shape = self.shape()
        rope = self.rope_parameters.model_dump(exclude_none=True)
        derived = {"num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim, "rope_parameters": rope}
        return {**super().config_keys(), **derived}

    def shrunk(self) -> Self:
        """The smoke form."""
        is_grouped = self.num_key_value_heads not in (None, self.num_attention_heads)
        return self.changed(
            num_hidden_layers=min(self.num_hidden_layers, LAYERS),
            hidden_size=WIDTH,
            intermediate_size=INTERMEDIATE,
            num_attention_heads=HEADS,
            max_position_embeddings=POSITIONS,
            num_key_value_heads=HEADS // 2 if is_grouped else None,
            head_dim=None if self.head_dim is None else WIDTH // HEADS,
        )


class Llama(_Rotary):
    """transformers' LlamaConfig (Touvron et al. 2023)."""

    family: Literal["decoder"] = meaning(description="Decoder-only transformer.")
    type: Literal["llama"] = meaning(description="transformers' model_type.")
    mlp_bias: bool = meaning(False, description="Biases in the feed-forward layer.")

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> "Llama":
        """transformers asks for it in this type even where `head_dim` is given."""
        require_divides(self, "num_attention_heads", "hidden_size")
        return self

    def _further_in_block(self, shape: Shape) -> int:
        """Biases of the feed-forward layer."""
        return 2 * shape.intermediate + shape.width if self.mlp_bias else 0


class Qwen3(_Rotary):
    """transformers' Qwen3Config: llama's block with norms on queries and keys."""

    family: Literal["decoder"] = meaning(description="Decoder-only transformer.")
    type: Literal["qwen3"] = meaning(description="transformers' model_type.")

    def kept_shares(self) -> Kept:
        """What a layer keeps of a token: norms on queries and keys too."""
        return Kept(widths=14)

    def _further_in_block(self, shape: Shape) -> int:
        """Norms on queries and keys."""
        return 2 * shape.head_dim


class Gpt2(LanguageArchitecture):
    """transformers' GPT2Config (Radford et al. 2019): learned positions, layer norms, biases."""

    positions_key: ClassVar[str] = "n_positions"
    family: Literal["decoder"] = meaning(description="Decoder-only transformer.")
    type: Literal["gpt2"] = meaning(description="transformers' model_type.")
    n_embd: int = meaning(ge=8, le=65_536, description="Width of the residual stream.")
    n_layer: int = meaning(ge=1, le=512, description="Transformer blocks.")
    n_head: int = meaning(ge=1, le=1024, description="Attention heads; must divide n_embd.")
    n_positions: int = meaning(
        1024, ge=8, le=10**7, description="Longest sequence in tokens; a learned vector for each."
    )
    n_inner: int | None = meaning(
        None, ge=8, le=1_048_576, description="Width of the feed-forward layer; null: 4 x n_embd."
    )
    activation_function: Activation = meaning("gelu_new", description="Activation of the feed-forward layer.")
    resid_pdrop: float = meaning(0.0, ge=0, lt=1, description="Dropout on the residual branches; always off in RLHF.")
    embd_pdrop: float = meaning(0.0, ge=0, lt=1, description="Dropout on the embeddings; always off in RLHF.")
    attn_pdrop: float = meaning(0.0, ge=0, lt=1, description="Dropout on attention weights; always off in RLHF.")
    layer_norm_epsilon: float = meaning(1e-5, gt=0, le=1, description="Added to the variance in the norms.")
    initializer_range: float = meaning(0.02, gt=0, le=1, description="Standard deviation of the initial weights.")
    scale_attn_weights: bool = meaning(
        True, description="Divide attention logits by the square root of the head's width."
    )
    scale_attn_by_inverse_layer_idx: bool = meaning(
        False, description="Divide attention logits by the layer's number too."
    )
    tie_word_embeddings: bool = meaning(True, description="Share the input and the output embedding.")

    @model_validator(mode="after")
    def _heads_fit(self) -> "Gpt2":
        require_divides(self, "n_head", "n_embd")
        return self

    def shape(self) -> Shape:
        """The architecture's numbers under one name for every type."""
        return Shape(
            layers=self.n_layer,
            width=self.n_embd,
            heads=self.n_head,
            kv_heads=self.n_head,
            head_dim=self.n_embd // self.n_head,
            intermediate=self.n_inner or 4 * self.n_embd,
            positions=self.n_positions,
            tied=self.tie_word_embeddings,
        )

    def body_parameters(self, vocab_size: int) -> int:
        """Parameters without a head."""
        shape, width = self.shape(), self.n_embd
        attention = width * 3 * width + 3 * width + width * width + width
        feed_forward = 2 * width * shape.intermediate + shape.intermediate + width
        rows = vocab_size + self.n_positions
        return rows * width + self.n_layer * (attention + feed_forward + 4 * width) + 2 * width

    def linears(self) -> list[Linear]:
        """The linear modules that an adapter can be put on; attention and feed-forward have a `c_proj` each."""
        width, wide = self.n_embd, self.shape().intermediate
        return [
            Linear("c_attn", width, 3 * width, self.n_layer),
            Linear("c_proj", width, width, self.n_layer),
            Linear("c_fc", width, wide, self.n_layer),
            Linear("c_proj", wide, width, self.n_layer),
        ]

    def kept_shares(self) -> Kept:
        """What a layer keeps of a token: its activation is made of several steps; dropout keeps all scores."""
        return Kept(intermediates=5, scores=3 if self.attn_pdrop else 0.5)

    @classmethod
    def num_layers_of(cls, config: Mapping[str, Any], stack: str) -> Any:
        """The number of layers by `config.json`."""
        return config.get("n_layer")

    def shrunk(self) -> Self:
        """The smoke form."""
        return self.changed(
            n_layer=min(self.n_layer, LAYERS),
            n_embd=WIDTH,
            n_head=HEADS,
            n_inner=None if self.n_inner is None else INTERMEDIATE,
            n_positions=POSITIONS,
        )


class AnyDecoder(LibraryArchitecture):
    """Any other causal language model of transformers; its keys are those of the type's own configuration."""

    family: Literal["decoder"] = meaning(description="Decoder-only transformer.")
    type: type_names("decoder", without=("llama", "qwen3", "gpt2")) = meaning(  # type: ignore[valid-type]
        description="transformers' model_type."
    )


DECODER = TextFamily(
    name="decoder",
    noun="a decoder",
    types=library_types("decoder", {"llama": Llama, "qwen3": Qwen3, "gpt2": Gpt2}, AnyDecoder),
    auto_class="AutoModelForCausalLM",
    tuning_role="instructions",
    takes_few_bits=True,
    suites=(
        "perplexity",
        "generation",
        "comparison",
        "multiple_choice",
        "last_word",
        "pairs",
        "bbq",
        "generate",
        "code",
        "lm_eval",
    ),
    continues=True,
    reads_captions=True,
)
