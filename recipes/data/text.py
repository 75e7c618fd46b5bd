"""Sources of rows of text of a recipe."""

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, Union, get_args

from pydantic import Discriminator, Field, Tag, model_validator

from recipes.data.filters import Filter
from recipes.data.selection import Member, Selection
from recipes.errors import FieldFinding, at
from recipes.fields import Strict, TagAt, added_meaning, meaning, placement, refuse
from recipes.problem_codes import Code

Split = Literal["train", "validation", "test"]
Column = Literal[
    "text", "label", "messages", "prompt", "completion", "chosen", "rejected", "system", "tools", "image", "images"
]


def _max_dropped() -> Any:
    return placement(
        0.9,
        ge=0,
        le=1,
        description="Largest share of the rows that may be dropped (too long, empty, without a response); above it the "
        "stage stops before it trains.",
    )


class _TextSelection(Selection):
    """What every source of rows of text can be asked for."""

    max_dropped: float = _max_dropped()

    filter: list[Filter] | None = added_meaning(
        None,
        min_length=1,
        description="Filters in their order, before rows are held out; a row counts for the first that leaves it out. "
        "null: every row.",
    )
    alias: str | None = placement(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="Name of the source in messages, reports and metrics of a mixture; null: its file's or folder's.",
    )
    weight: float | None = added_meaning(
        None,
        gt=0,
        le=10**9,
        description="Share of the source in a mixture, over the sum of all its weights; null: each row once an epoch.",
    )

    has_weights: ClassVar[bool] = False

    def all_filters(self) -> list[tuple[str, Filter]]:
        return [(f"filter.{number}", item) for number, item in enumerate(self.filter or ())]

    @property
    def has_labels(self) -> bool | None:
        """Whether every row has a label, or none has; None: only the rows tell."""
        return None

    def rules_alone(self) -> Iterator[FieldFinding]:
        """Keys that only a source of a mixture has."""
        for key in ("alias", "weight"):
            if (value := getattr(self, key)) is not None:
                message = f"{key} has no effect outside of a mixture"
                yield at(key, value, Code.NO_EFFECT, message, "remove the key, or list the source under `mix`")


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


class FeedbackPairs(_Rows):
    """The set of preferences that a `feedback` stage makes, which is there once that stage has run."""

    source: Literal["feedback"] = meaning(description="Reads what a feedback stage makes: pairs of answers.")
    from_: str = meaning(alias="from", description="The feedback stage, or an address in the store.")

    @property
    def made_by(self) -> str:
        return self.from_


PlainSource = Annotated[
    PythonDocs | PythonSummaries | TextFiles | JsonLines | Csv | Parquet | Datasets | FeedbackPairs,
    Field(discriminator="source"),
]
LEAST_SHARE = 1e-4
"""Of the weights of a mixture."""


class Mix(Strict):
    """Rows of several sources."""

    source: ClassVar[Literal["mix"]] = "mix"
    mix: list[PlainSource] = meaning(
        min_length=1,
        description="The sources. All of them have a `weight`, or none has: each row comes once an epoch.",
    )
    weigh: Literal["rows", "tokens"] = meaning(
        "rows",
        description="What the weights are shares of: rows of the built set (sequences, pairs, prompts), or tokens.",
    )
    filter: list[Filter] | None = added_meaning(
        None, min_length=1, description="Filters of the rows of all sources together, after their own; null: none."
    )
    until: Literal["first", "all"] = meaning(
        "all",
        description="With weights, an epoch ends once the first source is used up, or once all are: shorter ones come "
        "again until then. Every epoch reads on where the one before stopped.",
    )
    max_dropped: float = _max_dropped()

    @model_validator(mode="after")
    def _consistent(self) -> "Mix":
        weights = [source.weight for source in self.mix]
        given = [weight for weight in weights if weight is not None]
        if given and len(given) < len(weights):
            refuse(Code.MISSING_KEY, f"mix.{weights.index(None)} has no weight, and others have; give all or none")
        if not given and (self.weigh, self.until) != ("rows", "all"):
            refuse(Code.NO_EFFECT, "weigh and until have no effect without weights")
        if given and min(given) < LEAST_SHARE * sum(given):
            least = LEAST_SHARE * sum(given)
            refuse(Code.OUT_OF_RANGE, f"the least weight is {min(given):g}; of all of these at least {least:g}")
        aliases = [source.alias for source in self.mix if source.alias is not None]
        repeated = sorted({alias for alias in aliases if aliases.count(alias) > 1})
        if repeated:
            refuse(Code.DUPLICATE_ITEM, f"alias {repeated[0]!r} is listed twice")
        return self

    made_by: ClassVar[None] = None
    """Its members answer."""

    @property
    def has_weights(self) -> bool:
        """Whether some rows come more often than others."""
        return self.weights is not None

    @property
    def weights(self) -> list[float] | None:
        """Each source's share of an epoch; None: each row comes once."""
        given = [source.weight for source in self.mix if source.weight is not None]
        return [weight / math.fsum(given) for weight in given] if given else None

    @property
    def hold_out(self) -> float:
        """The largest share that one of the sources holds out."""
        return max(source.hold_out for source in self.mix)

    @property
    def has_labels(self) -> bool | None:
        """What all sources say, where they agree."""
        found = {source.has_labels for source in self.mix}
        return found.pop() if len(found) == 1 else None

    def members(self) -> Sequence[Member[PlainSource]]:
        """The sources by their names."""
        names: list[str] = []
        for source in self.mix:
            first = source.alias or _name(source)
            same = sum(1 for other in self.mix[: len(names)] if first == (other.alias or _name(other)))
            names.append(f"{first}-{same + 1}" if same else first)
        return [
            Member(name, f"mix.{number}.", source)
            for number, (name, source) in enumerate(zip(names, self.mix, strict=True))
        ]

    def all_filters(self) -> list[tuple[str, Filter]]:
        """The filters of its sources and its own by the paths of their keys."""
        own = [(member.field + path, item) for member in self.members() for path, item in member.source.all_filters()]
        return [*own, *((f"filter.{number}", item) for number, item in enumerate(self.filter or ()))]

    def limited(self, rows: int) -> Self:
        """The mixture with at most this many rows, equally many of each source."""
        share = -(-rows // len(self.mix))
        return self.changed(mix=[source.limited(share) for source in self.mix])

    def next_split(self) -> Self | None:
        """The next splits, and what `hold_out` keeps away, of the sources that have either."""
        held_out = [source.next_split() or (source if source.hold_out > 0 else None) for source in self.mix]
        found = [
            source.changed(alias=member.name, weight=member.source.weight)
            for source, member in zip(held_out, self.members(), strict=True)
            if source is not None
        ]
        return self.changed(mix=found) if found else None

    def rules_alone(self) -> Iterator[FieldFinding]:
        """Its sources have their keys here."""
        yield from ()


def _name(source: PlainSource) -> str:
    """A source's name by its first file, its folder or hub id, or its kind."""
    place = getattr(source, "path", None) or next(iter(getattr(source, "files", [])), "")
    path = PurePosixPath(place)
    parts = [path.name.partition(".")[0], *(part.name for part in path.parents)]
    named = next((part for part in parts if part and not set(part) & set("*?[")), source.source)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", named).strip("-.") or source.source


def _tag(kind: type[_TextSelection]) -> str:
    (tag,) = get_args(kind.model_fields["source"].annotation)
    return str(tag)


if TYPE_CHECKING:
    Source = PlainSource | Mix
else:
    Source = Annotated[
        Union[
            *(Annotated[kind, Tag(_tag(kind))] for kind in get_args(get_args(PlainSource)[0])),
            Annotated[Mix, Tag("mix")],
        ],
        Discriminator(TagAt(("source",), instead=("mix", "mix"))),
    ]
