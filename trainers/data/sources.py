"""Sources of rows: python-docs, text, JSON lines, CSV, Parquet and `datasets`, with part, limit and hold_out applied."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from recipes.data import Source

RowRole = Literal["text", "instructions", "preferences", "prompts"]


@dataclass(frozen=True)
class Row:
    """One row in its role's canonical form, and where it came from.

    text: {text}; instructions: {messages} or {prompt, completion} or {text}; preferences: {prompt, chosen, rejected};
    prompts: {prompt, reference}. prompt, completion, chosen, rejected are strings or lists of messages.
    """

    id: str
    """File and row, for example `train.jsonl:17`; for python-docs the dotted name."""
    columns: dict[str, Any]


def source_digest(source: Source, base_dir: Path) -> str:
    """Return 64 hex digits that change when the rows of the source can change; reads files, never rows.

    Names of files do not count, their bytes and their order do. Raises RequestError for missing files.
    """
    raise NotImplementedError


def read_rows(source: Source, base_dir: Path, role: RowRole, seed: int, *, held_out: bool = False) -> Iterator[Row]:
    """Yield the selected rows in source order; raises RequestError naming file and row of anything unreadable."""
    raise NotImplementedError


def evaluation_source(source: Source, evaluation: Source | None) -> tuple[Source, bool] | None:
    """Return (source, held_out) to evaluate on: the recipe's own, python-docs' validation split, or the rows of
    `hold_out`; None where there is nothing held out."""
    raise NotImplementedError
