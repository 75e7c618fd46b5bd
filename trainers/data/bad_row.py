"""A row that does not have the form that its role needs."""

from collections.abc import Mapping
from typing import Any

from recipes.problem_codes import Code


class BadRow(ValueError):  # noqa: N818
    """Says what is wrong with a row and what would be right."""

    def __init__(self, message: str, suggestion: str = "", code: Code = Code.WRONG_CELL_TYPE) -> None:
        super().__init__(message)
        self.code = code
        self.suggestion = suggestion


def columns_of(row: Mapping[str, Any]) -> str:
    """Name the columns of a row, for messages."""
    return "columns there: " + (", ".join(str(name) for name in list(row)[:12]) or "none")
