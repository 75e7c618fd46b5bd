"""Rules that compare a response with the true answer that its prompt's row holds."""

import re
import unicodedata
from decimal import Decimal
from typing import Any, Literal

from recipes.fields import meaning
from recipes.stages.rewards.term import Row, Rule, Term

NUMBER = re.compile(r"(?:(?<![\w.])[-+])?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)")
"""A sign counts where no word or number stands before it: 5-3 holds 5 and 3."""


def answer_text(cell: Any) -> str | None:
    """A cell as the text of an answer; None: it is neither text nor a number."""
    return str(cell) if isinstance(cell, str | int | float) and not isinstance(cell, bool) else None


def last_number(text: str) -> Decimal | None:
    """The last number of a text, as GSM8K's answers are read: thousands may have commas; None: it has none."""
    found = NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    return Decimal(found[-1].replace(",", "")) if found else None


class WithAnswer(Term):
    """A term that reads the true answer."""

    column: str = meaning(
        "answer", min_length=1, description="The column of the prompt's row that holds the true answer."
    )

    @property
    def carried(self) -> tuple[str, ...]:
        return (self.column,)

    @property
    def answer_column(self) -> str:
        return self.column

    def row_rule(self, row: Row) -> str:
        if answer_text(row[self.column]) is None:
            return f"column {self.column!r} is {type(row[self.column]).__name__}, not text or a number"
        return ""

    def answer(self, row: Row) -> str:
        """The true answer of a row that `row_rule` has let pass."""
        text = answer_text(row[self.column])
        assert text is not None, "rows are checked before they are scored"
        return text


class Exact(WithAnswer, Rule):
    """1 where the response is the true answer, else 0; space around them and forms of Unicode make no difference."""

    rule: Literal["exact"] = meaning(description="The response is the true answer.")
    ignore_case: bool = meaning(False, description="Upper and lower case make no difference.")

    def value(self, text: str, row: Row) -> float:
        return float(self._form(text) == self._form(self.answer(row)))

    def _form(self, text: str) -> str:
        form = unicodedata.normalize("NFC", text.strip())
        return form.casefold() if self.ignore_case else form


class Number(WithAnswer, Rule):
    """1 where the last number of the response equals the last number of the true answer, else 0 (as for GSM8K)."""

    rule: Literal["number"] = meaning(description="The response's last number is that of the true answer.")

    def row_rule(self, row: Row) -> str:
        if wrong := super().row_rule(row):
            return wrong
        answer = self.answer(row)
        return "" if last_number(answer) is not None else f"column {self.column!r} holds no number: {answer[:80]!r}"

    def value(self, text: str, row: Row) -> float:
        found = last_number(text)
        return float(found is not None and found == last_number(self.answer(row)))


class MathVerify(WithAnswer):
    """1 where math-verify finds the response equal to the true answer as mathematics, else 0.

    It reads LaTeX and plain expressions. It runs in a separate process; what takes longer than its limit is worth 0.
    """

    rule: Literal["math_verify"] = meaning(description="math-verify finds the response equal to the true answer.")
