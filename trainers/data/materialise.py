"""Turns rows into an indexed, memory-mapped data set that is built once and kept in the store under its digest."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from recipes.data import Source, TrainTokenizer
from trainers.data.sources import RowRole
from trainers.data.tokenizer import Tokenization

Form = Literal["packed", "pairs", "prompts"]


@dataclass(frozen=True)
class DataRequest:
    """Everything that decides the tokens of a data set; `base_dir` only says where relative paths start."""

    source: Source
    base_dir: Path
    role: RowRole
    """Which rows are read: text, instructions, preferences or prompts."""
    form: Form
    """packed: TokenBatch (text, instructions); pairs: PairBatch (preferences); prompts: PromptBatch (prompts)."""
    tokenization: Tokenization
    sequence_length: int
    """Longest row in tokens. Text is split, instructions are truncated, pairs and prompts are dropped; all counted."""
    seed: int
    """Draws the rows that `limit` keeps."""
    packing: bool = True
    """False: one row (or one piece of a longer text) a sequence."""
    loss_on: Literal["responses", "all"] = "responses"
    """Instructions only: which tokens are targets. Rows of plain text have targets everywhere."""
    held_out: bool = False
    """Read the rows that the source's `hold_out` keeps away from training, instead of the others."""
    source_digest: str | None = None
    """What `source_digest` gave when the run started; None computes it. A difference to the present files is an error."""

    def digest(self) -> str:
        """Return the data set's identity: 64 hex digits over source, selection, tokenizer, lengths and this code's version."""
        raise NotImplementedError


@dataclass(frozen=True)
class BuildReport:
    """What became of the rows."""

    rows_in: int
    """Rows read, after part, limit and hold_out."""
    kept: int
    truncated: int
    split: int
    """Texts cut into several pieces."""
    dropped: dict[str, int]
    """Reason -> rows: empty, too_long, no_response, equal_pair."""
    examples: dict[str, list[str]]
    """Reason -> ids of the first few such rows."""
    sequences: int
    """Rows of the data set: packed sequences, pairs or prompts."""
    tokens: int
    supervised_tokens: int
    fill: float
    """Share of the positions that hold real tokens."""

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON."""
        raise NotImplementedError


@dataclass(frozen=True)
class Dataset:
    """A materialised data set; the arrays are read-only and memory-mapped."""

    digest: str
    form: Form
    report: BuildReport
    arrays: Mapping[str, np.ndarray]
    pad_id: int
    records: list[dict[str, Any]] = field(default_factory=list)
    """prompts only: {"id", "text" (the rendered prompt), "reference" (a known good answer or None)} per row."""

    def __len__(self) -> int:
        """Return the number of rows: packed sequences, pairs or prompts."""
        raise NotImplementedError


def materialise(request: DataRequest, store: Any) -> Dataset:
    """Open the data set from the store, or build and commit it; concurrent builders agree, the first commit wins.

    Raises RequestError for unreadable rows (naming file and row), for no rows, and for a set without supervised tokens
    (naming rows).
    """
    raise NotImplementedError


def build_tokenization(spec: TrainTokenizer, source: Source, base_dir: Path, seed: int, store: Any) -> Tokenization:
    """Train a tokenizer on a source's text, or take it from the store where the same was trained before."""
    raise NotImplementedError
