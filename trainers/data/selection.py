"""Which rows of a source are kept: hold_out, part and limit, by hashes of what the rows hold (pure)."""

import hashlib
import heapq
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

from recipes.data.selection import Selection


class Keyed(Protocol):
    """A row with a name, and a key that rows share which must go the same way."""

    @property
    def id(self) -> str:
        """Where the row came from."""

    def key(self) -> bytes:
        """Return what part, limit and hold_out go by."""


R = TypeVar("R", bound=Keyed)


def select(rows: Callable[[], Iterator[R]], selection: Selection, seed: int, *, held_out: bool) -> Iterator[R]:
    """Yield the selected rows in their order: first hold_out (with `held_out` only that), then part, then limit.

    `rows` gives all of them each time that it is called; a limit reads them twice and holds only the draw.
    """

    def kept() -> Iterator[R]:
        return (row for row in rows() if _is_kept(row, selection, held_out))

    return kept() if selection.limit is None else _draw_rows(kept, selection.limit, seed)


def _is_kept(row: Keyed, selection: Selection, held_out: bool) -> bool:
    hold_out: float = getattr(selection, "hold_out", 0.0)
    if hold_out == 0 and selection.part is None:
        return not held_out
    key = row.key()
    if (_draw("hold_out", key) / 2**64 < hold_out) != held_out:
        return False
    if selection.part is None:
        return True
    index, of = (int(number) for number in selection.part.split("/"))
    return _draw("part", key) % of == index - 1


def _draw_rows(rows: Callable[[], Iterator[R]], limit: int, seed: int) -> Iterator[R]:
    lottery = ((_draw(f"limit {seed} ", row.key() + row.id.encode()), number) for number, row in enumerate(rows()))
    drawn = {number for _, number in heapq.nsmallest(limit, lottery)}
    return (row for number, row in enumerate(rows()) if number in drawn)


def _draw(purpose: str, key: bytes) -> int:
    return int.from_bytes(hashlib.sha256(purpose.encode() + key).digest()[:8], "big")
