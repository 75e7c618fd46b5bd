"""Tokenizers and chat templates of a recipe."""

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from recipes.fields import Strict, meaning, refuse
from recipes.problem_codes import Code
from recipes.smoke_sizes import VOCABULARY
from recipes.tokenizers.sentinels import SENTINEL

DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
"""Turns `<|role|>`-marked messages into text; an assistant turn ends with the end-of-sequence token."""


class TrainTokenizer(Strict):
    """A byte-level BPE tokenizer trained on the stage's own data."""

    train: Literal["bpe"] = meaning(description="Algorithm: byte-level byte-pair encoding (Sennrich et al. 2016).")
    vocab_size: int = meaning(ge=300, le=1_000_000, description="Entries, special tokens and the 256 bytes included.")
    eos_token: str = meaning("<|end|>", min_length=1, description="Ends a document or a response.")
    pad_token: str = meaning("<|pad|>", min_length=1, description="Fills a batch; must differ from eos_token.")
    cls_token: str | None = meaning(
        None, min_length=1, description="Stands before every text; encoders classify by it, and need it."
    )
    mask_token: str | None = meaning(None, min_length=1, description="Stands for a hidden token; encoders need it.")
    num_sentinels: int = meaning(
        0,
        ge=0,
        le=1000,
        description="Tokens <extra_id_0>, ... for hidden spans; encoder-decoders need them.",
    )
    special_tokens: list[Annotated[str, Field(min_length=1)]] = meaning(
        default_factory=lambda: ["<|system|>", "<|user|>", "<|assistant|>"],
        description="Further tokens that are never split; the chat template's role marks by default.",
    )
    chat_template: str = meaning(DEFAULT_CHAT_TEMPLATE, description="Jinja template in transformers' convention.")

    @property
    def names(self) -> list[str]:
        """Every special token, in the order of its id."""
        optional = [token for token in (self.cls_token, self.mask_token) if token is not None]
        sentinels = [SENTINEL.format(number) for number in range(self.num_sentinels)]
        return [self.pad_token, self.eos_token, *optional, *self.special_tokens, *sentinels]

    @model_validator(mode="after")
    def _distinct(self) -> "TrainTokenizer":
        names = self.names
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            refuse(Code.DUPLICATE_ITEM, f"special tokens must differ from each other; {repeated} is listed twice")
        return self

    def shrunk(self) -> Self:
        """The smoke form."""
        needed = 256 + len(self.names)
        return self.changed(vocab_size=min(self.vocab_size, max(VOCABULARY, needed + 64)))


class ExistingTokenizer(Strict):
    """A tokenizer that exists already, in the Hugging Face layout."""

    from_: str = meaning(
        alias="from", description="A store address, a local folder or hf://org/name@revision with a tokenizer.json."
    )
    eos_token: str | None = meaning(None, description="Overrides the end token; must be in the vocabulary.")
    pad_token: str | None = meaning(
        None, description="Overrides the pad token; must be in the vocabulary and differ from eos."
    )
    chat_template: str | None = meaning(None, description="Overrides the Jinja chat template.")

    def shrunk(self) -> Self:
        """The smoke form, which has the same tokens."""
        return self


def _tokenizer_form(value: Any) -> str | None:
    """Which form is written: the one whose distinguishing key is there."""
    if isinstance(value, TrainTokenizer | ExistingTokenizer):
        return "train" if isinstance(value, TrainTokenizer) else "from"
    if not isinstance(value, dict):
        return None
    return "train" if "train" in value else "from" if "from" in value or "from_" in value else None


Tokenizer = Annotated[
    Annotated[TrainTokenizer, Tag("train")] | Annotated[ExistingTokenizer, Tag("from")],
    Discriminator(
        _tokenizer_form,
        custom_error_type="tokenizer_form",
        custom_error_message="a tokenizer is a mapping with `train: bpe` (train one) or `from: ...` (take one)",
    ),
]
