"""Architectures by transformers' own configuration keys; a contract test compares every class with the pinned library.

Left out on purpose: `vocab_size` and the special token ids (they follow from the tokenizer), and keys that change no
weight and no output of a decoder (`use_cache`, `pretraining_tp`, `summary_*`, ...).
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from recipes.fields import Strict, meaning, refuse, require_divides
from recipes.models.encoder import Bert
from recipes.models.encoder_decoder import T5, Bart
from recipes.models.rnn import Rnn
from recipes.problem_codes import Code
from recipes.smoke_sizes import HEADS, INTERMEDIATE, LAYERS, POSITIONS, WIDTH

Activation = Literal["silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu"]


@dataclass(frozen=True, slots=True)
class Shape:
    """The numbers that parameter counts and length checks need, under one name for every type."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    positions: int | None
    """Longest sequence in tokens; None: any."""
    tied: bool


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


class _Rotary(Strict):
    """Keys that the llama and qwen3 types share."""

    hidden_size: int = meaning(ge=8, le=65_536, description="Width of the residual stream.")
    intermediate_size: int = meaning(ge=8, le=1_048_576, description="Width of the gated feed-forward layer.")
    num_hidden_layers: int = meaning(ge=1, le=512, description="Transformer blocks.")
    num_attention_heads: int = meaning(ge=1, le=1024, description="Query heads.")
    num_key_value_heads: int | None = meaning(
        None,
        ge=1,
        le=1024,
        description="Key and value heads; must divide the query heads; None: one for each query head.",
    )
    head_dim: int | None = meaning(
        None, ge=2, le=1024, multiple_of=2, description="Width of a head; None: hidden_size / num_attention_heads."
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


class Qwen3(_Rotary):
    """transformers' Qwen3Config: llama's block with norms on queries and keys."""

    family: Literal["decoder"] = meaning(description="Decoder-only transformer.")
    type: Literal["qwen3"] = meaning(description="transformers' model_type.")


class Gpt2(Strict):
    """transformers' GPT2Config (Radford et al. 2019): learned positions, layer norms, biases."""

    family: Literal["decoder"] = meaning(description="Decoder-only transformer.")
    type: Literal["gpt2"] = meaning(description="transformers' model_type.")
    n_embd: int = meaning(ge=8, le=65_536, description="Width of the residual stream.")
    n_layer: int = meaning(ge=1, le=512, description="Transformer blocks.")
    n_head: int = meaning(ge=1, le=1024, description="Attention heads; must divide n_embd.")
    n_positions: int = meaning(
        1024, ge=8, le=10**7, description="Longest sequence in tokens; a learned vector for each."
    )
    n_inner: int | None = meaning(
        None, ge=8, le=1_048_576, description="Width of the feed-forward layer; None: 4 x n_embd."
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

    def shrunk(self) -> Self:
        """The smoke form."""
        return self.changed(
            n_layer=min(self.n_layer, LAYERS),
            n_embd=WIDTH,
            n_head=HEADS,
            n_inner=None if self.n_inner is None else INTERMEDIATE,
            n_positions=POSITIONS,
        )


Decoder = Annotated[Llama | Qwen3 | Gpt2, Field(discriminator="type")]
Architecture = Annotated[Llama | Qwen3 | Gpt2 | Rnn | Bert | T5 | Bart, Field(discriminator="type")]
"""Language models; no two families share the name of a type."""

LINEAR_MODULES: dict[str, tuple[str, ...]] = {
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "qwen3": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "gpt2": ("c_attn", "c_proj", "c_fc"),
    "bert": ("query", "key", "value", "dense"),
    "t5": ("q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo"),
    "bart": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    "llava": (
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        *("out_proj", "fc1", "fc2", "linear_1", "linear_2"),
    ),
}
"""Names of the linear modules of each type that an adapter can be put on; a recurrent model has none."""

MODEL_TYPES: dict[str, str] = {
    **dict.fromkeys(("llama", "qwen3", "gpt2"), "decoder"),
    "rnn": "rnn",
    "bert": "encoder",
    **dict.fromkeys(("t5", "bart"), "encoder_decoder"),
    "llava": "vision_language",
}
"""`model_type` of a configuration file -> family."""


def architecture_shape(architecture: Llama | Qwen3 | Gpt2 | Rnn | Bert | T5 | Bart) -> Shape:
    """The architecture's numbers under one name for every type."""
    match architecture:
        case Rnn():
            return Shape(
                layers=architecture.num_hidden_layers,
                width=architecture.embedding_size or architecture.hidden_size,
                heads=1,
                kv_heads=1,
                head_dim=architecture.hidden_size,
                intermediate=4 * architecture.hidden_size,
                positions=None,
                tied=architecture.tie_word_embeddings,
            )
        case Bert():
            return Shape(
                layers=architecture.num_hidden_layers,
                width=architecture.hidden_size,
                heads=architecture.num_attention_heads,
                kv_heads=architecture.num_attention_heads,
                head_dim=architecture.hidden_size // architecture.num_attention_heads,
                intermediate=architecture.intermediate_size,
                positions=architecture.max_position_embeddings,
                tied=architecture.tie_word_embeddings,
            )
        case T5():
            return Shape(
                layers=architecture.num_layers + architecture.decoder_layers,
                width=architecture.d_model,
                heads=architecture.num_heads,
                kv_heads=architecture.num_heads,
                head_dim=architecture.d_kv,
                intermediate=architecture.d_ff,
                positions=None,
                tied=True,
            )
        case Bart():
            heads = max(architecture.encoder_attention_heads, architecture.decoder_attention_heads)
            return Shape(
                layers=architecture.encoder_layers + architecture.decoder_layers,
                width=architecture.d_model,
                heads=heads,
                kv_heads=heads,
                head_dim=architecture.d_model // heads,
                intermediate=max(architecture.encoder_ffn_dim, architecture.decoder_ffn_dim),
                positions=architecture.max_position_embeddings,
                tied=True,
            )
        case Gpt2():
            return Shape(
                layers=architecture.n_layer,
                width=architecture.n_embd,
                heads=architecture.n_head,
                kv_heads=architecture.n_head,
                head_dim=architecture.n_embd // architecture.n_head,
                intermediate=architecture.n_inner or 4 * architecture.n_embd,
                positions=architecture.n_positions,
                tied=architecture.tie_word_embeddings,
            )
        case Llama() | Qwen3():
            return Shape(
                layers=architecture.num_hidden_layers,
                width=architecture.hidden_size,
                heads=architecture.num_attention_heads,
                kv_heads=architecture.num_key_value_heads or architecture.num_attention_heads,
                head_dim=architecture.head_dim or architecture.hidden_size // architecture.num_attention_heads,
                intermediate=architecture.intermediate_size,
                positions=architecture.max_position_embeddings,
                tied=architecture.tie_word_embeddings,
            )


def config_keys(architecture: Llama | Qwen3 | Gpt2 | Bert | T5 | Bart) -> dict[str, Any]:
    """Keyword arguments of the type's transformers configuration, every derived value written out."""
    keys = architecture.model_dump(exclude={"family", "type"})
    if isinstance(architecture, Gpt2 | Bert | T5 | Bart):
        return keys
    shape = architecture_shape(architecture)
    keys["num_key_value_heads"] = shape.kv_heads
    keys["head_dim"] = shape.head_dim
    keys["rope_parameters"] = {key: value for key, value in keys["rope_parameters"].items() if value is not None}
    return keys
