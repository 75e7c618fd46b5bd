"""What every source answers besides its rows: which of them are kept, and which sources it is made of."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Self, TypeVar

from pydantic import model_validator

from recipes.data.filters import Filter
from recipes.fields import Strict, meaning, refuse
from recipes.problem_codes import Code

S_co = TypeVar("S_co", covariant=True)


@dataclass(frozen=True, slots=True)
class Member(Generic[S_co]):
    """A source of rows, as a part of the one that a stage names."""

    name: str
    """In reports and messages; empty: it is the whole."""
    field: str
    """Its place below the whole, as `mix.0.`; empty: it is the whole."""
    source: S_co


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

    @property
    def made_by(self) -> str | None:
        """The stage, or the address in the store, whose artifact holds the rows; None: no artifact does."""
        return None

    def members(self) -> "Sequence[Member[Self]]":
        """The sources that it is made of: itself alone."""
        return [Member("", "", self)]

    def all_filters(self) -> "list[tuple[str, Filter]]":
        """Its filters and those of its members by the paths of their keys."""
        return []

    def limited(self, rows: int) -> Self:
        """The source with at most this many rows."""
        return self.changed(limit=rows if self.limit is None else min(self.limit, rows))

    def next_split(self) -> Self | None:
        """Rows to evaluate on where the recipe names none; None: what `hold_out` keeps away from training."""
        return None
