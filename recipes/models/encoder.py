"""Encoder-only models: the keys of their configuration, how they are pretrained, and how they learn without labels."""

from typing import Literal, Self

from pydantic import model_validator

from recipes.errors import Finding
from recipes.fields import Strict, meaning, require_divides
from recipes.models.base import Head, Kept, LanguageArchitecture, Linear, Shape, TextFamily, library_types
from recipes.models.library import LibraryArchitecture, type_names
from recipes.problem_codes import Code
from recipes.smoke_sizes import HEADS, INTERMEDIATE, LAYERS, POSITIONS, WIDTH


class Bert(LanguageArchitecture):
    """transformers' BertConfig (Devlin et al. 2019)."""

    family: Literal["encoder"] = meaning(description="Encoder-only transformer.")
    type: Literal["bert"] = meaning(description="transformers' model_type.")
    hidden_size: int = meaning(ge=8, le=65_536, description="Width of the residual stream.")
    num_hidden_layers: int = meaning(ge=1, le=512, description="Transformer blocks.")
    num_attention_heads: int = meaning(ge=1, le=1024, description="Attention heads; must divide hidden_size.")
    intermediate_size: int = meaning(ge=8, le=1_048_576, description="Width of the feed-forward layer.")
    hidden_act: Literal["gelu", "gelu_new", "relu", "silu"] = meaning(
        "gelu", description="Activation of the feed-forward layer."
    )
    hidden_dropout_prob: float = meaning(0.1, ge=0, lt=1, description="Dropout on embeddings and residual branches.")
    attention_probs_dropout_prob: float = meaning(0.1, ge=0, lt=1, description="Dropout on attention weights.")
    max_position_embeddings: int = meaning(512, ge=8, le=10**7, description="Longest sequence in tokens.")
    type_vocab_size: int = meaning(2, ge=1, le=64, description="Kinds of segment; only the first is used here.")
    initializer_range: float = meaning(0.02, gt=0, le=1, description="Standard deviation of the initial weights.")
    layer_norm_eps: float = meaning(1e-12, gt=0, le=1, description="Added to the variance in the norms.")
    tie_word_embeddings: bool = meaning(True, description="Share the input and the output embedding.")

    @model_validator(mode="after")
    def _heads_fit(self) -> "Bert":
        require_divides(self, "num_attention_heads", "hidden_size")
        return self

    def shape(self) -> Shape:
        """The architecture's numbers under one name for every type."""
        return Shape(
            layers=self.num_hidden_layers,
            width=self.hidden_size,
            heads=self.num_attention_heads,
            kv_heads=self.num_attention_heads,
            head_dim=self.hidden_size // self.num_attention_heads,
            intermediate=self.intermediate_size,
            positions=self.max_position_embeddings,
            tied=self.tie_word_embeddings,
        )

    def body_parameters(self, vocab_size: int) -> int:
        """Parameters without a head."""
        width, wide = self.hidden_size, self.intermediate_size
        block = 4 * (width * width + width) + 2 * width * wide + wide + width
        rows = vocab_size + self.max_position_embeddings + self.type_vocab_size
        return (rows + 2) * width + self.num_hidden_layers * (block + 4 * width)

    def head_parameters(self, vocab_size: int, head: Head) -> int:
        """Parameters that a head adds; that of hidden tokens has a layer, a norm and a bias."""
        own = self.hidden_size**2 + 3 * self.hidden_size + vocab_size if head == "lm" else 0
        return own + super().head_parameters(vocab_size, head)

    def kept_shares(self) -> Kept:
        """What a layer keeps of a token: scores only for their dropout."""
        widths = 11 if self.hidden_dropout_prob else 9
        return Kept(widths, 2, 3 if self.attention_probs_dropout_prob else 0)

    def linears(self) -> list[Linear]:
        """The linear modules that an adapter can be put on; three places have one called `dense`."""
        width, wide, layers = self.hidden_size, self.intermediate_size, self.num_hidden_layers
        sizes = {"query": (width, width), "key": (width, width), "value": (width, width)}
        dense = ((width, width), (width, wide), (wide, width))
        return [Linear(name, *size, layers) for name, size in (*sizes.items(), *(("dense", size) for size in dense))]

    def shrunk(self) -> Self:
        """The smoke form."""
        return self.changed(
            num_hidden_layers=min(self.num_hidden_layers, LAYERS),
            hidden_size=WIDTH,
            intermediate_size=INTERMEDIATE,
            num_attention_heads=HEADS,
            max_position_embeddings=POSITIONS,
        )


class Corruption(Strict):
    """What a model has to restore in pretraining; one in ten is kept and one replaced by a random one."""

    share: float = meaning(0.15, gt=0, lt=1, description="Share of the tokens that are hidden.")
    whole_words: bool = meaning(False, description="Hide all tokens of a word or none.")


class PseudoLabels(Strict):
    """Learning from rows without a label (FixMatch, Sohn et al. 2020, with hidden words as the strong augmentation).

    The model labels each such row; where it is confident, it must predict the same with words hidden.
    """

    threshold: float = meaning(0.9, ge=0, lt=1, description="Least confidence at which a pseudo-label counts.")
    weight: float = meaning(1.0, gt=0, le=100, description="Weight of the loss on them, per row as for labelled ones.")
    ratio: int = meaning(3, ge=1, le=64, description="Rows without a label for each labelled row of a batch.")
    hidden_share: float = meaning(0.15, gt=0, lt=1, description="Share of the tokens hidden in the second view.")
    warmup_steps: int = meaning(0, ge=0, le=10**9, description="Steps without them, in which labels alone teach.")

    def needs_unlabelled(self, rows: str) -> Finding:
        """The rule that rows are left to learn from without a label is broken by `rows`."""
        message = f"every row of {rows} has a label that is used; no row is left to pseudo-label"
        return Finding(Code.NO_EFFECT, message, "a labelled_share below 1")

    def shrunk(self) -> Self:
        """The smoke form."""
        return self.changed(ratio=min(self.ratio, 2), warmup_steps=min(self.warmup_steps, 2))


class AnyEncoder(LibraryArchitecture):
    """Any other masked language model of transformers; its keys are those of the type's own configuration."""

    family: Literal["encoder"] = meaning(description="Encoder-only transformer.")
    type: type_names("encoder", without=("bert",)) = meaning(  # type: ignore[valid-type]
        description="transformers' model_type."
    )


ENCODER = TextFamily(
    name="encoder",
    noun="an encoder",
    types=library_types("encoder", {"bert": Bert}, AnyEncoder),
    auto_class="AutoModelForMaskedLM",
    tuning_role="labels",
    keys=("corruption", "labelled_share", "pseudo_labels", "dropout"),
    needed_tokens=("cls_token", "mask_token"),
    pretraining_counts="target_tokens",
    reads_captions=True,
)
