"""A data set: what a layout makes of rows, the memory-mapped arrays as they are read, and what became of the rows."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from recipes.errors import RequestError
from trainers.data.encoding import TextSettings
from trainers.data.mixed_order import RowOrder, Shuffled
from trainers.data.mixture import Draw, Mixture, drawn
from trainers.data.row_forms import Role
from trainers.data.selection import Keyed

NUM_EXAMPLES = 5
NO_LABEL = -1
WARN_LOST = 0.1
"""Share of the rows above which their loss is a warning."""


@dataclass
class Fate:
    """What became of the rows that a layout may cut, truncate or drop; counted while a set is built."""

    kept: int = 0
    truncated: int = 0
    """Rows cut at the sequence length."""
    split: int = 0
    """Texts cut into several pieces."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Reason -> rows: empty, empty_turn, no_response, equal_pair, too_long."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """Reason -> ids of the first few such rows."""

    def note(self, reason: str, row: Keyed) -> None:
        """Remember the first few rows of a reason."""
        if len(self.examples.setdefault(reason, [])) < NUM_EXAMPLES:
            self.examples[reason].append(row.id)

    def truncate(self, row: Keyed) -> None:
        """Count a row that loses its end."""
        self.truncated += 1
        self.note("truncated", row)

    def drop(self, reason: str, row: Keyed) -> None:
        """Count a row that is left out."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        self.note(reason, row)

    def sorted(self) -> "Fate":
        """Return the same with reasons by the alphabet."""
        return replace(self, dropped=dict(sorted(self.dropped.items())), examples=dict(sorted(self.examples.items())))


@dataclass(frozen=True)
class BuildReport:
    """What became of the rows, and what the set holds."""

    rows_in: int
    """Rows read, after hold_out, part and limit."""
    holds: Mapping[str, int | float]
    """Of text: sequences, tokens, supervised_tokens, and fill, the share of the positions that hold real tokens. Of
    images: channels, height, width, and how many different classes and captions there are.
    """
    fate: Fate | None = None
    """None: the layout keeps every row."""
    forms: Mapping[str, int] = field(default_factory=dict)
    """Published forms that rows were recognised as -> rows."""
    unread: Mapping[str, int] = field(default_factory=dict)
    """Columns, and keys of messages (`messages.name`), that hold something and that nothing reads -> rows."""
    filtered: Mapping[str, int] = field(default_factory=dict)
    """Why filters left rows out, before all others were counted -> rows."""
    sources: Mapping[str, Mapping[str, int | float]] = field(default_factory=dict)
    """Of a mixture, by source: rows_in, kept, sequences, tokens, and the share of the rows that are drawn."""

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "BuildReport":
        """Read what `to_json` gave."""
        holds = dict(found)
        rows_in = holds.pop("rows_in")
        forms, unread, filtered, sources = (holds.pop(name, {}) for name in ("forms", "unread", "filtered", "sources"))
        fate = Fate(**{name: holds.pop(name) for name in asdict(Fate())}) if "kept" in holds else None
        return cls(rows_in, holds, fate, forms, unread, filtered, sources)

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON."""
        read = {name: dict(getattr(self, name)) for name in ("forms", "unread", "filtered", "sources")}
        fate = {} if self.fate is None else asdict(self.fate)
        return {"rows_in": self.rows_in, **fate, **{key: rows for key, rows in read.items() if rows}, **self.holds}

    @property
    def dropped(self) -> int:
        """Rows that were left out."""
        return 0 if self.fate is None else sum(self.fate.dropped.values())

    @property
    def dropped_share(self) -> float:
        """Share of the rows that were left out."""
        return self.dropped / max(self.rows_in, 1)

    @property
    def lost_share(self) -> float:
        """The larger of the shares of rows that were left out and that lost their end."""
        truncated = 0 if self.fate is None else self.fate.truncated
        return max(self.dropped, truncated) / max(self.rows_in, 1)

    def lost(self, sequence_length: int) -> list[str]:
        """Say which rows were dropped or truncated, why, and for example which; nothing where none were."""
        fate, said = self.fate or Fate(), []
        if fate.dropped:
            reasons = [f"{count:,} {_reason(name, sequence_length)}" for name, count in fate.dropped.items()]
            examples = self._for_example(fate, fate.dropped)
            said.append(f"{self._share(self.dropped)} dropped: {', '.join(reasons)}; {examples}")
        if fate.truncated:
            example = self._for_example(fate, ["truncated"])
            said.append(f"{self._share(fate.truncated)} truncated to {sequence_length} tokens; {example}")
        return said

    def nothing_to_learn(self, sequence_length: int) -> str:
        """Say that the set holds nothing to learn from, and what became of its rows."""
        examples = {} if self.fate is None else self.fate.examples
        reasons = "; ".join(f"{reason}: {', '.join(ids)}" for reason, ids in examples.items())
        return f"nothing to learn from in {self.rows_in} rows at sequence_length {sequence_length}: {reasons}"

    def _share(self, count: int) -> str:
        return f"{count:,} of {self.rows_in:,} rows ({count / max(self.rows_in, 1):.0%})"

    def _for_example(self, fate: Fate, reasons: Iterable[str]) -> str:
        return "for example " + ", ".join([name for reason in reasons for name in fate.examples.get(reason, [])][:3])


def _reason(name: str, sequence_length: int) -> str:
    return {
        "empty": "empty",
        "empty_turn": "with an empty turn",
        "no_response": f"without a response in {sequence_length} tokens",
        "equal_pair": "with equal answers",
        "incomplete": "without the other sentence of their pair",
        "too_long": f"longer than {sequence_length} tokens",
    }.get(name, name)


@dataclass(frozen=True)
class Chunks:
    """An array that is made while it is stored: its type, its shape, and its bytes in C order."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    chunks: Iterable[bytes]


@dataclass
class Contents:
    """What a layout makes of rows: the files of a set before they are stored."""

    arrays: dict[str, np.ndarray | Chunks]
    row_ids: list[str]
    """Rows that were kept, in their order."""
    holds: dict[str, int | float]
    """What the report says that the set holds."""
    learns_nothing: bool
    """Whether there is nothing in it to learn from."""
    classes: Sequence[str] = ()
    records: list[dict[str, Any]] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    mixture: Mixture | None = None
    """Whose the rows are, where they come from several sources."""
    drawn: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What a stream holds of each source, where weights decide it."""


class DataLayout(Protocol):
    """How rows become the arrays of a set, and rows of the set a batch: one class in `trainers/data/layouts`.

    An object holds the settings that decide the arrays; a set that is read knows the class.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    """Raised when the same rows and settings give other arrays."""
    sides: ClassVar[tuple[str, ...]]
    """Arrays `{side}_ids` whose longer one is a row's length, by which ranks are dealt rows; none: by position."""

    @property
    def role(self) -> Role:
        """What the rows are read for."""

    @property
    def text(self) -> TextSettings | None:
        """How texts become tokens; None: a layout without any."""

    def identity(self) -> dict[str, Any]:
        """Return the settings, as plain JSON that equal sets share: digests are taken of it."""

    def encode(self, rows: Iterable[Any]) -> Iterator[Any]:
        """Yield each row with what it becomes; raises RequestError naming a row that does not fit."""

    def arrays(self, encoded: Iterable[Any], fate: Fate) -> Contents:
        """Lay out what `encode` gave, and count what became of the rows."""

    @staticmethod
    def collate(dataset: "Dataset", rows: Sequence[int]) -> Any:
        """Return the batch of these rows, one of `trainers.data.batches.Batch`; rows of -1 are fillers."""


@dataclass(frozen=True)
class Dataset:
    """A materialised data set; the arrays are read-only and memory-mapped. Its layout says which ones there are."""

    digest: str
    layout: type[DataLayout]
    report: BuildReport
    arrays: Mapping[str, np.ndarray]
    pad_id: int = 0
    """Of the tokens."""
    classes: tuple[str, ...] = ()
    """What `labels` are places in."""
    records: list[dict[str, Any]] = field(default_factory=list)
    """Of prompts, per row: id, text (rendered prompt), prompt (text or messages), reference (good answer or None); with
    rewards that read columns of the rows, those as `columns`. Of cases: id, text, reference, case, columns."""
    captions: tuple[str, ...] = ()
    """Of images: one each; none without captions."""
    row_ids_path: Path | None = None
    mixture: Mixture | None = None
    """Whose the rows are, of a set of several sources."""

    def order(self, seed: int, among: Sequence[int] | np.ndarray | None = None) -> RowOrder:
        """Return the order of training of the rows, or of some of them, sorted by number."""
        rows = range(len(self)) if among is None else among
        if self.mixture is None:
            return Shuffled(self.digest, seed, rows)
        return self.mixture.order(self.digest, seed, rows)

    def drawn(self, order: RowOrder, positions: int) -> dict[str, Draw]:
        """Return how much was drawn of each source of a mixture before a position."""
        return {} if self.mixture is None else drawn(self.mixture, order, self.arrays, positions)

    def with_names(self, names: Sequence[str]) -> "Dataset":
        """Return the same with its sources named as the recipe names them: the set may be an older run's."""
        if self.mixture is None or tuple(names) == self.mixture.names:
            return self
        sources = dict(zip(names, self.report.sources.values(), strict=True))
        report = replace(self.report, sources=sources)
        return replace(self, mixture=replace(self.mixture, names=tuple(names)), report=report)

    def by_source(self) -> dict[str, range]:
        """Return the rows of each source of a mixture; of another set nothing."""
        mixture = self.mixture
        names = () if mixture is None or not mixture.ends else mixture.names
        return {name: mixture.rows(source) for source, name in enumerate(names) if mixture is not None}

    def __len__(self) -> int:
        """Return the number of rows: packed sequences, pairs, prompts, cases or images."""
        return int(self.report.holds.get("sequences", self.report.rows_in))

    @property
    def images_NCHW(self) -> np.ndarray:
        """Images, 8 bits a value."""
        return self.arrays["images"]

    @property
    def labels_N(self) -> np.ndarray:
        """int64 places in `classes`; -1 where a label is not known."""
        return self.arrays["labels"]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width of images."""
        channels, height, width = self.images_NCHW.shape[1:]
        return channels, height, width

    def cut(self, name: str, row: int) -> np.ndarray:
        """Return a row's part of an array that holds all rows one after the other."""
        first = f"{name}_offsets" if f"{name}_offsets" in self.arrays else f"{name.rpartition('_')[0]}_offsets"
        offsets = self.arrays[first]
        return self.arrays[name][offsets[row] : offsets[row + 1]]

    def lengths(self, rows: Sequence[int]) -> list[int]:
        """Return the number of tokens of each packed sequence, else of each row's longer side."""
        if not self.layout.sides:
            return [int(length) for length in (self.arrays["segment_ids"][list(rows)] > 0).sum(axis=1)]
        return [max(len(self.cut(f"{side}_ids", row)) for side in self.layout.sides) for row in rows]

    @property
    def row_ids(self) -> list[str]:
        """The rows of the source that the set holds; what error messages name."""
        return [] if self.row_ids_path is None else self.row_ids_path.read_text(encoding="utf-8").split("\n")[:-1]

    def with_classes(self, classes: Sequence[str]) -> "Dataset":
        """Return the set with labels numbered as in `classes`; raises RequestError for a label that is not there."""
        if tuple(classes) == self.classes:
            return self
        unknown = [name for name in self.classes if name not in classes]
        if unknown:
            raise RequestError(f"labels {', '.join(unknown[:8])} of the held-out rows are not in the training data")
        places = np.array([classes.index(name) for name in self.classes] + [NO_LABEL], dtype=np.int64)
        return replace(self, arrays={**self.arrays, "labels": places[self.labels_N]}, classes=tuple(classes))
