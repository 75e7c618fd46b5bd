"""Data sources, tokenizers and chat templates of a recipe."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from recipes.fields import Strict, added_meaning, meaning, placement, refuse
from recipes.problem_codes import Code
from recipes.smoke_sizes import VOCABULARY
from recipes.tokenizers.sentinels import SENTINEL

Split = Literal["train", "validation", "test"]
Column = Literal[
    "text", "label", "messages", "prompt", "completion", "chosen", "rejected", "system", "tools", "image", "images"
]

DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
"""Turns `<|role|>`-marked messages into text; an assistant turn ends with the end-of-sequence token."""


class Selection(Strict):
    """What every source answers besides its rows."""

    part: str | None = meaning(
        None,
        pattern=r"^[1-9][0-9]*/[1-9][0-9]*$",
        description="Keep one of n disjoint parts of the rows, for example '1/2'; rows of one prompt share a part.",
    )
    limit: int | None = meaning(
        None, ge=1, le=10**12, description="Keep at most this many rows, drawn by the seed; null keeps all."
    )

    @model_validator(mode="after")
    def _part_within(self) -> "Selection":
        if self.part is not None:
            index, of = (int(number) for number in self.part.split("/"))
            if index > of:
                refuse(Code.OUT_OF_RANGE, f"part {self.part}: the first number must be between 1 and {of}")
        return self

    def limited(self, rows: int) -> Self:
        """The source with at most this many rows."""
        return self.changed(limit=rows if self.limit is None else min(self.limit, rows))

    def next_split(self) -> Self | None:
        """Rows to evaluate on where the recipe names none; None: what `hold_out` keeps away from training."""
        return None


class _TextSelection(Selection):
    """What every source of rows of text can be asked for."""

    max_dropped: float = placement(
        0.9,
        ge=0,
        le=1,
        description="Largest share of the rows that may be dropped (too long, empty, without a response); above it the "
        "stage stops before it trains.",
    )

    @property
    def has_labels(self) -> bool | None:
        """Whether every row has a label, or none has; None: only the rows tell."""
        return None


class _Documentation(_TextSelection):
    """Rows whose modules are split for good, so that none need to be held out."""

    hold_out: ClassVar[float] = 0.0

    def next_split(self) -> Self | None:
        """The split after this one, whole."""
        split = {"train": "validation", "validation": "test", "test": None}[self.split]  # type: ignore[attr-defined]
        whole = {"source": self.source, "split": split, "max_dropped": self.max_dropped}  # type: ignore[attr-defined]
        return None if split is None else type(self).model_validate(whole)


class PythonDocs(_Documentation):
    """The documentation that the running Python installation carries; the stage's kind determines which set is read."""

    source: Literal["python-docs"] = meaning(
        description="Reads the standard library's docstrings and language reference."
    )
    split: Split = meaning("train", description="Which part of the modules: train, validation or test.")

    @property
    def has_labels(self) -> bool:
        """Answers have the kind of thing that they describe."""
        return True


class PythonSummaries(_Documentation):
    """Summaries from the same documentation: a docstring without its first sentence, and that sentence.

    Rows of `prompt` and `completion`. The modules are split as python-docs splits them.
    """

    source: Literal["python-docs-summaries"] = meaning(
        description="Reads docstrings without their first sentence, to be summed up by it."
    )
    split: Split = meaning("train", description="Which part of the modules: train, validation or test.")


class Patterns(Strict):
    """Local files by their names."""

    files: list[str] = meaning(
        min_length=1, description="Paths or glob patterns, relative to the recipe's folder; read in sorted order."
    )


class DatasetsPlace(Strict):
    """Where a `datasets` data set lies."""

    path: str = meaning(description="A local folder, or a hub id such as org/name; a hub id needs `revision`.")
    revision: str | None = meaning(
        None, description="Commit hash or tag of the hub data set; null only for a local folder."
    )
    name: str | None = meaning(None, description="Configuration name of the hub data set.")
    split: str = meaning("train", description="Split of the data set, or a part of it, as train[:10%].")


class _Rows(_TextSelection):
    """What every source of rows with columns can be asked for."""

    columns: dict[Column, str] = meaning(
        default_factory=dict,
        description="Maps a standard column (text, label, messages, prompt, completion, chosen, rejected, system, "
        "tools, image, images) to its own here, to a place inside one (a[0].b), or to a text with places in braces.",
    )
    hold_out: float = meaning(
        0.0,
        ge=0,
        lt=1,
        description="Share of rows, chosen by their hash, kept out of training and used for evaluation.",
    )


class TextFiles(_Rows, Patterns):
    """Plain UTF-8 text, one document a file, or one a blank-line-separated paragraph."""

    source: Literal["text"] = meaning(description="Reads plain UTF-8 text files.")
    documents: Literal["file", "paragraph"] = meaning(
        "file", description="What one document is: a whole file or a paragraph."
    )
    labels: Literal["none", "folder"] = added_meaning(
        "none", description="folder: a document's label is the name of the folder that its file lies in."
    )

    @property
    def has_labels(self) -> bool:
        """The folders may tell them."""
        return self.labels == "folder"


class JsonLines(_Rows, Patterns):
    """One JSON object a line, or one array of them; packed files are read too."""

    source: Literal["jsonl"] = meaning(description="Reads files with one JSON object a line, or one array.")


class Csv(_Rows, Patterns):
    """Comma- or tab-separated values; packed files are read too."""

    source: Literal["csv"] = meaning(description="Reads CSV or TSV files.")
    delimiter: Literal[",", "\t", ";", "|"] | None = meaning(
        None, description="The separator of cells; null: a tab where the name ends in .tsv, else a comma."
    )
    quotes: bool = meaning(True, description="Double quotes enclose cells; false: they are characters like others.")
    header: list[Annotated[str, Field(min_length=1)]] | None = meaning(
        None, min_length=1, description="Names of the columns of files without a header line; null: the first line."
    )

    @model_validator(mode="after")
    def _distinct_columns(self) -> "Csv":
        repeated = sorted({name for name in self.header or [] if (self.header or []).count(name) > 1})
        if repeated:
            refuse(Code.DUPLICATE_ITEM, f"header names {repeated[0]!r} twice")
        return self


class Parquet(_Rows, Patterns):
    """Apache Parquet."""

    source: Literal["parquet"] = meaning(description="Reads Apache Parquet files.")


class Datasets(_Rows, DatasetsPlace):
    """A `datasets` data set: a folder written by `save_to_disk` or downloaded from the hub, or a hub id."""

    source: Literal["datasets"] = meaning(description="Reads a data set through the `datasets` library.")


Source = Annotated[
    PythonDocs | PythonSummaries | TextFiles | JsonLines | Csv | Parquet | Datasets, Field(discriminator="source")
]


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
