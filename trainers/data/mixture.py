"""The sources of a mixture in a built set: which rows are whose, in which order they come, how much was drawn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from recipes.data.text import Mix
from recipes.errors import RequestError
from trainers.data.mixed_order import RowOrder, Shuffled, Weighted


@dataclass(frozen=True, slots=True)
class Mixture:
    """Sources of a set, whose rows are stored one source after the other."""

    names: tuple[str, ...]
    ends: tuple[int, ...]
    """Where the rows of each source end."""
    shares: tuple[float, ...] | None = None
    """Of the rows that are drawn, which the weights come to; None: each row comes once an epoch."""
    until: Literal["first", "all"] = "all"

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "Mixture":
        """Read what `vars` gave."""
        shares = None if found["shares"] is None else tuple(found["shares"])
        return cls(tuple(found["names"]), tuple(found["ends"]), shares, found["until"])

    def to_json(self) -> dict[str, Any]:
        """Return the same as plain JSON."""
        return {"names": list(self.names), "ends": list(self.ends), "shares": self.shares, "until": self.until}

    def rows(self, source: int) -> range:
        """Return the rows of a source."""
        return range(self.ends[source - 1] if source else 0, self.ends[source])

    def slice(self, source: int) -> slice:
        """Return the rows of a source in an array."""
        rows = self.rows(source)
        return slice(rows.start, rows.stop)

    def order(self, digest: str, seed: int, among: Sequence[int] | np.ndarray) -> RowOrder:
        """Return the order of some rows, sorted by number; raises RequestError for a weighted source without any."""
        if self.shares is None:
            return Shuffled(digest, seed, among)
        borders = np.searchsorted(np.asarray(among), self.ends)
        starts = [0, *borders[:-1]]
        groups = tuple(among[int(start) : int(end)] for start, end in zip(starts, borders, strict=True))
        for name, rows in zip(self.names, groups, strict=True):
            if not len(rows):
                raise RequestError(f"source {name} has a weight, and no row to draw; remove it from the mixture")
        return Weighted(digest, seed, groups, self.shares, self.until)


class Built(Protocol):
    """What a layout made of rows."""

    @property
    def arrays(self) -> Mapping[str, Any]:
        """The set's arrays by name."""

    @property
    def row_ids(self) -> Sequence[str]:
        """Rows that were kept, in their order."""


@dataclass(slots=True)
class SourceCounts:
    """Rows of each source as they come in while a set is built."""

    rows_in: dict[str, int] = field(default_factory=dict)
    by_row: dict[str, str] = field(default_factory=dict)
    """A row's id -> its source."""

    def note(self, row_id: str, source: str) -> None:
        """Count a row."""
        self.rows_in[source] = self.rows_in.get(source, 0) + 1
        self.by_row[row_id] = source

    def mixture(self, mix: Mix, contents: Built) -> Mixture:
        """Return the source of each built row; a stream's texts, which are spread over rows, have none.

        What weights come to is in the stream already.
        """
        names = [member.name for member in mix.members()]
        owners = self._owners(contents)
        if owners is None:
            return Mixture(tuple(names), ())
        ends = np.cumsum([owners.count(name) for name in names]).tolist()
        shares = None if mix.weights is None else list(mix.weights)
        found = Mixture(tuple(names), tuple(ends), None if shares is None else tuple(shares), mix.until)
        if shares is None or mix.weigh == "rows":
            return found
        tokens = row_tokens(contents.arrays)
        means = [float(tokens[found.slice(place)].mean()) if found.rows(place) else 1.0 for place in range(len(names))]
        draws = [share / mean for share, mean in zip(shares, means, strict=True)]
        return Mixture(found.names, found.ends, tuple(draw / sum(draws) for draw in draws), mix.until)

    def report(self, mixture: Mixture, contents: Built) -> dict[str, dict[str, Any]]:
        """Return what the build report says of each source: rows read and kept, and what the set has of it."""
        kept = dict.fromkeys(mixture.names, 0)
        for row_id in contents.row_ids:
            kept[self.by_row[row_id]] += 1
        found: dict[str, dict[str, Any]] = {
            name: {"rows_in": self.rows_in.get(name, 0), "kept": kept[name]} for name in mixture.names
        }
        tokens = row_tokens(contents.arrays) if mixture.ends else np.zeros(0)
        for source, name in enumerate(mixture.names if mixture.ends else ()):
            count = int(tokens[mixture.slice(source)].sum())
            found[name] |= {"sequences": len(mixture.rows(source)), "tokens": count}
            found[name] |= {} if mixture.shares is None else {"share": mixture.shares[source]}
        return found

    def _owners(self, contents: Built) -> list[str] | None:
        """Return the source of each row of the set: of a packed sequence that of its first piece."""
        arrays, ids = contents.arrays, contents.row_ids
        if "tokens" in arrays:
            return None
        first: Sequence[int] = range(len(ids))
        if "row_offsets" in arrays:
            first = arrays["rows"][arrays["row_offsets"][:-1]]
        return [self.by_row[ids[int(place)]] for place in first]


def row_tokens(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the number of tokens of each row of a set of text."""
    if "segment_ids" in arrays:
        found: np.ndarray = (np.asarray(arrays["segment_ids"]) > 0).sum(axis=1)
        return found
    texts = [name for name in arrays if name.endswith("_offsets") and name.replace("_offsets", "_ids") in arrays]
    return sum((np.diff(arrays[name]) for name in texts if name != "mismatched_offsets"), start=np.zeros(1, np.int64))


@dataclass(frozen=True, slots=True)
class Draw:
    """How much of a source was drawn."""

    rows: int
    tokens: int
    epochs: float


def drawn(mixture: Mixture, order: RowOrder, arrays: Mapping[str, np.ndarray], positions: int) -> dict[str, Draw]:
    """Return what the rows before a position hold of each source; exact."""
    if not mixture.ends:
        return {}
    times, tokens = order.times(positions, mixture.ends[-1]), row_tokens(arrays)
    found = {}
    for source, name in enumerate(mixture.names):
        own = mixture.slice(source)
        count, held = int(times[own].sum()), int((times[own] * tokens[own]).sum())
        found[name] = Draw(count, held, count / max(len(mixture.rows(source)), 1))
    return found
