"""Recurrent language models: the keys of their configuration."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from recipes.fields import meaning
from recipes.models.base import LanguageArchitecture, Linear, ModelType, Shape, TextFamily
from recipes.smoke_sizes import LAYERS, WIDTH


class Rnn(LanguageArchitecture):
    """LSTM (Hochreiter & Schmidhuber 1997) or GRU (Cho et al. 2014) language model over torch's own layers."""

    family: Literal["rnn"] = meaning(description="Recurrent language model.")
    type: Literal["lstm", "gru"] = meaning(description="Which cell torch.nn.LSTM or torch.nn.GRU runs.")
    hidden_size: int = meaning(ge=8, le=65_536, description="Width of the state.")
    num_hidden_layers: int = meaning(1, ge=1, le=64, description="Recurrent layers on top of each other.")
    embedding_size: int | None = meaning(
        None, ge=8, le=65_536, description="Width of the embeddings; null: that of the state."
    )
    dropout: float = meaning(
        0.0,
        ge=0,
        lt=1,
        description="Dropout on embeddings, between the layers and before the head (Zaremba et al. 2014).",
    )
    tie_word_embeddings: bool = meaning(
        True,
        description="Share the input and the output embedding (Press & Wolf 2017); a projection goes between where "
        "their width is not the state's.",
    )
    initializer_range: float = meaning(0.05, gt=0, le=1, description="Standard deviation of the initial embeddings.")

    def shape(self) -> Shape:
        """The architecture's numbers under one name for every type."""
        return Shape(
            layers=self.num_hidden_layers,
            width=self.embedding_size or self.hidden_size,
            heads=1,
            kv_heads=1,
            head_dim=self.hidden_size,
            intermediate=4 * self.hidden_size,
            positions=None,
            tied=self.tie_word_embeddings,
        )

    def body_parameters(self, vocab_size: int) -> int:
        """Parameters without a head."""
        shape, state = self.shape(), self.hidden_size
        gates = 4 if self.type == "lstm" else 3
        inputs = shape.width + (shape.layers - 1) * state
        body = vocab_size * shape.width + gates * state * (inputs + shape.layers * (state + 2))
        return body + (0 if shape.width == state else state * shape.width)

    def linears(self) -> list[Linear]:
        """None that an adapter can be put on."""
        return []

    def multiplied_parameters(self) -> int:
        """Parameters of the cells, and of the projection to the embedding's width."""
        return self.body_parameters(0)

    def attention_flops(self, length: int) -> int:
        """None: it has no attention."""
        return 0

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> LanguageArchitecture:
        """The architecture of a `config.json`, which names the type `cell`."""
        known = {name: config[name] for name in cls.model_fields if name in config and name not in ("family", "type")}
        return cls.model_construct(family="rnn", type=config["cell"], **known)

    @classmethod
    def num_layers_of(cls, config: Mapping[str, Any], stack: str) -> Any:
        """None: torch names the layers in one module, which is no stack."""
        return None

    def shrunk(self) -> Self:
        """The smoke form."""
        return self.changed(
            num_hidden_layers=min(self.num_hidden_layers, LAYERS),
            hidden_size=min(self.hidden_size, WIDTH),
            embedding_size=None if self.embedding_size is None else min(self.embedding_size, WIDTH),
        )


RNN = TextFamily(
    name="rnn",
    noun="an rnn",
    types={"rnn": ModelType({"RnnForCausalLM": "model"}, Rnn)},
    auto_class="AutoModelForCausalLM",
    tuning_role="instructions",
    suites=("perplexity", "generation", "comparison"),
    is_recurrent=True,
    continues=True,
)
