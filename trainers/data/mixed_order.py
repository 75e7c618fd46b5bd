"""The order of rows that several sources share by weights: a pure function of (digest, seed, position)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol

import numpy as np

from trainers.data.order import epoch_order, global_sample, sample_at

PERIOD = 25_200
"""Positions after which the turns of the sources repeat; the smallest number that 1 to 10 divide, times ten."""


class RowOrder(Protocol):
    """The row at each position of training, without end."""

    @property
    def epoch(self) -> int:
        """Positions of one epoch."""

    @property
    def whole(self) -> int:
        """Positions after which every row has come."""

    def row(self, position: int) -> int:
        """Return the row at a position."""

    def times(self, positions: int, size: int) -> np.ndarray:
        """Return how often each row of a set of `size` stands before a position."""


@dataclass(frozen=True, slots=True)
class Shuffled:
    """Each row once an epoch."""

    digest: str
    seed: int
    rows: Sequence[int] | np.ndarray

    @property
    def epoch(self) -> int:
        """As many positions as rows."""
        return len(self.rows)

    @property
    def whole(self) -> int:
        """As many positions as rows."""
        return len(self.rows)

    def row(self, position: int) -> int:
        """Return the row at a position."""
        return int(self.rows[global_sample(self.digest, self.seed, position, len(self.rows))])

    def times(self, positions: int, size: int) -> np.ndarray:
        """Return how often each row of a set of `size` stands before a position."""
        found = np.zeros(size, dtype=np.int64)
        _count(found, self.rows, self.digest, self.seed, positions)
        return found


@dataclass(frozen=True, slots=True)
class Weighted:
    """Sources in turns, as evenly as their shares allow; each shuffled by itself, epoch by epoch."""

    digest: str
    seed: int
    groups: tuple[Sequence[int] | np.ndarray, ...]
    """Rows of each source, at least one."""
    shares: tuple[float, ...]
    """Of the positions; they sum to 1."""
    until: Literal["first", "all"]

    @property
    def epoch(self) -> int:
        """Positions until the first source is used up, or all are."""
        ends = self._ends()
        return min(ends) if self.until == "first" else max(ends)

    @property
    def whole(self) -> int:
        """Positions until all sources are used up."""
        return max(self._ends())

    def row(self, position: int) -> int:
        """Return the row at a position."""
        turns = turns_of(self.shares)
        period, place = divmod(position, PERIOD)
        source = int(turns.source[place])
        drawn, rows = period * turns.counts[source] + int(turns.before[place]), self.groups[source]
        epoch, at = divmod(drawn, len(rows))
        return int(rows[sample_at(self._digest(source), self.seed, epoch, at, len(rows))])

    def times(self, positions: int, size: int) -> np.ndarray:
        """Return how often each row of a set of `size` stands before a position."""
        turns, found = turns_of(self.shares), np.zeros(size, dtype=np.int64)
        periods, rest = divmod(positions, PERIOD)
        further = np.bincount(turns.source[:rest], minlength=len(self.shares))
        for source, rows in enumerate(self.groups):
            drawn = periods * turns.counts[source] + int(further[source])
            _count(found, rows, self._digest(source), self.seed, drawn)
        return found

    def _digest(self, source: int) -> str:
        return f"{self.digest}/{source}"

    def _ends(self) -> list[int]:
        """Positions after which each source is used up once."""
        turns, found = turns_of(self.shares), []
        for source, rows in enumerate(self.groups):
            periods, place = divmod(len(rows) - 1, turns.counts[source])
            found.append(periods * PERIOD + int(np.flatnonzero(turns.source == source)[place]) + 1)
        return found


def texts_by_tokens(
    lengths: Sequence[Sequence[int]], shares: Sequence[float], until: Literal["first", "all"]
) -> Iterator[tuple[int, int]]:
    """Yield texts, each by its source and its place there, for one stream of tokens.

    The next text is of the source that is furthest below its share of the tokens. Ends once the first source has been
    read to its end, or all have; one that ends before starts again.
    """
    tokens, texts = [0] * len(lengths), [0] * len(lengths)
    enough = any if until == "first" else all
    while not enough(count >= len(own) for count, own in zip(texts, lengths, strict=True)):
        source = min(range(len(shares)), key=lambda number: tokens[number] / shares[number])
        place = texts[source] % len(lengths[source])
        yield source, place
        tokens[source] += lengths[source][place]
        texts[source] += 1


def _count(times: np.ndarray, rows: Sequence[int] | np.ndarray, digest: str, seed: int, drawn: int) -> None:
    """Add so many draws in shuffled epochs of the rows."""
    places = np.asarray(rows)
    epochs, rest = divmod(drawn, len(places))
    times[places] += epochs
    if rest:
        times[places[epoch_order(digest, seed, epochs, len(places))[:rest]]] += 1


@dataclass(frozen=True, slots=True, eq=False)
class Turns:
    """Whose turn it is at each of `PERIOD` positions."""

    source: np.ndarray
    before: np.ndarray
    """How many turns the source had before."""
    counts: tuple[int, ...]


@lru_cache(maxsize=16)
def turns_of(shares: tuple[float, ...]) -> Turns:
    """Return the sources' turns: by their shares, to the nearest turn, each at least once; evenly apart.

    The j-th of a source's n turns comes at (j + 1/2) / n of the period.
    """
    counts = np.maximum(np.floor(np.array(shares) * PERIOD + 1e-6).astype(np.int64), 1)
    rests = np.array(shares) * PERIOD - counts
    for source in np.argsort(-rests, kind="stable")[: max(PERIOD - int(counts.sum()), 0)]:
        counts[source] += 1
    counts[int(np.argmax(counts))] -= int(counts.sum()) - PERIOD
    source = np.repeat(np.arange(len(shares)), counts)
    before = np.concatenate([np.arange(count) for count in counts])
    order = np.lexsort((source, (before + 0.5) / counts[source]))
    return Turns(source[order], before[order], tuple(int(count) for count in counts))
