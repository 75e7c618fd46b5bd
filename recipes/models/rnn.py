"""Recurrent language models: the keys of their configuration."""

from typing import Literal, Self

from recipes.fields import Strict, meaning
from recipes.smoke_sizes import LAYERS, WIDTH


class Rnn(Strict):
    """LSTM (Hochreiter & Schmidhuber 1997) or GRU (Cho et al. 2014) language model over torch's own layers."""

    family: Literal["rnn"] = meaning(description="Recurrent language model.")
    type: Literal["lstm", "gru"] = meaning(description="Which cell torch.nn.LSTM or torch.nn.GRU runs.")
    hidden_size: int = meaning(ge=8, le=65_536, description="Width of the state.")
    num_hidden_layers: int = meaning(1, ge=1, le=64, description="Recurrent layers on top of each other.")
    embedding_size: int | None = meaning(
        None, ge=8, le=65_536, description="Width of the embeddings; None: that of the state."
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

    def shrunk(self) -> Self:
        """The smoke form."""
        return self.changed(
            num_hidden_layers=min(self.num_hidden_layers, LAYERS),
            hidden_size=min(self.hidden_size, WIDTH),
            embedding_size=None if self.embedding_size is None else min(self.embedding_size, WIDTH),
        )
