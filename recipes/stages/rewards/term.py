"""What every term of a reward answers: its weight, the columns that it reads, its inputs, and, of a rule, its value."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from recipes.fields import Strict, meaning
from recipes.stages.answers import Input

Row = Mapping[str, Any]
"""The columns of a prompt's row that are carried to the reward."""
Value = Callable[[str, Row], float]
"""What a response to a row's prompt is worth."""


class Term(Strict):
    """One term of a reward: the score of a response is the sum of all terms, each times its weight."""

    weight: float = meaning(
        1.0, ge=-1000, le=1000, description="Factor of the term in the score; 0: the term is only measured."
    )

    @property
    def carried(self) -> tuple[str, ...]:
        """Columns of a prompt's row that it reads."""
        return ()

    @property
    def answer_column(self) -> str | None:
        """The column that holds the true answer; None: it knows of none."""
        return None

    @property
    def measures(self) -> tuple[str, ...]:
        """Further figures of each response that it gives, which are only measured."""
        return ()

    def inputs(self, place: str) -> list[Input]:
        """Artifacts that it reads; `place` is where the term stands in its stage."""
        return []

    def row_rule(self, row: Row) -> str:
        """What is wrong with a row for this term, in words; empty: nothing."""
        return ""


class Rule(Term):
    """A term that follows from the text of the response and from the row, without a model."""

    @abstractmethod
    def value(self, text: str, row: Row) -> float:
        """What the text of a response is worth."""

    def scorer(self, texts: Callable[[], Iterable[str]]) -> Value:
        """The rule where prompts and their true answers are these texts."""
        return self.value
